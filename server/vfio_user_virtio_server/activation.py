"""Sockets that were opened for us: by the service manager, or by whoever gave ``--fd``.

sd_listen_fds(3): descriptors 3 … 3 + ``LISTEN_FDS`` - 1, meant for the process ``LISTEN_PID``,
with names in ``LISTEN_FDNAMES``.  They arrive blocking and not close-on-exec.  The manager keeps a
duplicate of each: so they are never shut down, their paths are never unlinked, and O_NONBLOCK,
which both sides share, is what the manager expects to be set.
"""

from __future__ import annotations

import errno
import os
import socket
from typing import TYPE_CHECKING, Final

import attrs

from vfio_user_virtio.errors import ConfigError, HostError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vfio_user_virtio_server.config import InheritedSocket

FIRST_FD: Final = 3
"""SD_LISTEN_FDS_START."""

MAX_INHERITED: Final = 4096
"""More passed sockets than this is a mistake; the manager passes one per configured socket."""


@attrs.frozen
class Inherited:
    """A passed descriptor and its name, which is "unknown" unless the unit has one."""

    fd: int
    name: str


def take_inherited() -> tuple[Inherited, ...]:
    """The descriptors that are meant for this process; they are now close-on-exec.

    Takes the variables out of the environment, whether they were for us or not.  Raises
    ConfigError when they contradict themselves.
    """
    pid = os.environ.pop("LISTEN_PID", "")
    count = os.environ.pop("LISTEN_FDS", "")
    listed = os.environ.pop("LISTEN_FDNAMES", None)
    if not pid or not count or pid != str(os.getpid()):
        return ()
    if not count.isascii() or not count.isdigit() or not 0 < int(count) <= MAX_INHERITED:
        raise ConfigError(f"LISTEN_FDS={count} is not a number of sockets from 1 to 4096")
    names = ["unknown"] * int(count) if listed is None else listed.split(":")
    if len(names) != int(count):
        raise ConfigError(f"LISTEN_FDNAMES has {len(names)} names for LISTEN_FDS={count} sockets")
    passed = tuple(Inherited(fd, name) for fd, name in enumerate(names, FIRST_FD))
    for inherited in passed:
        try:
            os.set_inheritable(inherited.fd, False)
        except OSError as error:
            raise _not_passed(inherited.fd, error, "LISTEN_FDS") from None
    return passed


def assign(
    wanted: Sequence[InheritedSocket], passed: Sequence[Inherited], labels: Sequence[str]
) -> tuple[int, ...]:
    """Which passed descriptor each wanted socket is: those with names first, the others in order.

    `labels` say in messages who wants.  Raises ConfigError unless each gets one and none is left.
    """
    free = list(passed)
    chosen: dict[int, int] = {}
    for position, want in enumerate(wanted):
        if want.fd_name is None:
            continue
        matching = [inherited for inherited in free if inherited.name == want.fd_name]
        if len(matching) != 1:
            names = ", ".join(inherited.name for inherited in passed) or "none"
            raise ConfigError(
                f"{labels[position]} wants the passed socket {want.fd_name!r}, of which there are "
                f"{len(matching)}; passed are: {names}; set FileDescriptorName= in the socket unit"
            )
        free.remove(matching[0])
        chosen[position] = matching[0].fd
    in_order = [position for position in range(len(wanted)) if position not in chosen]
    if len(in_order) != len(free):
        waiting = ", ".join(labels[position] for position in in_order) or "no device"
        left = ", ".join(f"{inherited.fd} ({inherited.name})" for inherited in free) or "no socket"
        raise ConfigError(
            f"the passed sockets do not fit the devices: {waiting} got {left}; "
            "pass one socket per device, or give devices a socket_path"
        )
    chosen.update(
        (position, inherited.fd) for position, inherited in zip(in_order, free, strict=True)
    )
    return tuple(chosen[position] for position in range(len(wanted)))


def path_of(fd: int) -> str | None:
    """The path of a passed socket, empty if it has none; None if there is no UNIX socket."""
    try:
        with socket.socket(fileno=os.dup(fd)) as duplicate:
            if duplicate.family != socket.AF_UNIX:
                return None
            address = duplicate.getsockname()
    except OSError:
        return None
    return address if isinstance(address, str) else ""


@attrs.frozen
class Adopted:
    """A passed socket, and whether it listens or is a connection already."""

    sock: socket.socket
    listening: bool


def adopt(fd: int, how: str) -> Adopted:
    """Make a socket of a passed descriptor: non-blocking, close-on-exec, stream, local.

    It is ours from now on: closing it closes the descriptor.  `how` it was passed is for messages.
    Raises HostError.
    """
    try:
        sock = socket.socket(fileno=fd)
    except OSError as error:
        raise _not_passed(fd, error, how) from None
    try:
        listening = bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
        _check_kind(sock, listening=listening)
        sock.set_inheritable(False)
        sock.setblocking(False)
    except BaseException:
        sock.close()
        raise
    return Adopted(sock, listening)


def _check_kind(sock: socket.socket, *, listening: bool) -> None:
    family, kind = sock.family, sock.type
    if family != socket.AF_UNIX or kind != socket.SOCK_STREAM:
        raise HostError(
            f"descriptor {sock.fileno()} is a socket of {_name(family)} and {_name(kind)}, "
            "not a UNIX stream socket; use ListenStream= with a path",
            exit_code=os.EX_CONFIG,
        )
    if listening:
        return
    try:
        sock.getpeername()
    except OSError as error:
        if error.errno != errno.ENOTCONN:
            raise
        raise HostError(
            f"descriptor {sock.fileno()} is a socket that neither listens nor is connected; "
            "call listen() or connect() before passing it",
            exit_code=os.EX_CONFIG,
        ) from None


def _not_passed(fd: int, error: OSError, how: str) -> HostError:
    if error.errno == errno.EBADF:
        problem = "is not open; was it closed before the start, or is it close-on-exec?"
    elif error.errno == errno.ENOTSOCK:
        problem = "is not a socket"
    else:
        problem = f"cannot be used: {error.strerror}"
    return HostError(f"descriptor {fd} ({how}) {problem}", exit_code=os.EX_CONFIG)


def _name(constant: object) -> str:
    return getattr(constant, "name", str(constant))
