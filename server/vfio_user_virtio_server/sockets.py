"""Sockets that we make at a path: replace what is stale, touch nothing that is not ours.

A server that crashed leaves its socket behind, and the next must not fail over it; nor may a
second server take the path of one that is alive, nor anything but a dead socket be removed.  So:

1. Look.  Anything but a socket is refused.  A socket is asked by connect(): only "connection
   refused" means that nobody is there; whatever else is not certain, and refused.
2. Bind to a temporary name in the same folder and listen there.  The mode is set by umask, so there
   is no moment at which more may connect than in the end.
3. Where there was nothing, link() to the path, which fails if somebody was faster.  Where there was
   a stale socket, rename() over it, so that the path always leads to a socket.

Two servers that find the same stale socket in the same instant can still both rename; the later
one wins, and the other keeps its hands off at its end, since the path is not its inode any more.
A lock on the folder would close that gap, but anyone who may open the folder could hold it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import socket
import stat
from typing import TYPE_CHECKING, Final

import attrs

from vfio_user_virtio.errors import HostError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vfio_user_virtio_server.config import SocketPath

BACKLOG: Final = 16
"""Connections that may wait; a device serves one client at a time."""

_CANNOT_TELL: Final = (
    "cannot tell whether a server is alive there: {}; stop that server or remove the socket"
)


@attrs.frozen
class PathListener:
    """A listening socket, and which inode `path` was when it was made."""

    sock: socket.socket
    path: str
    device: int
    inode: int

    def close(self) -> None:
        """Unlink, then close.  Idempotent."""
        self.unlink()
        self.sock.close()

    def unlink(self) -> None:
        """Remove the path if it still leads to this socket; clients find nobody from now on.

        Only while the socket is open: after that its inode might belong to another file.
        """
        if self.sock.fileno() < 0:
            return
        with contextlib.suppress(OSError):
            status = os.lstat(self.path)
            if (status.st_dev, status.st_ino) == (self.device, self.inode):
                os.unlink(self.path)


def listen_at(wanted: SocketPath) -> PathListener:
    """Listen at a path, non-blocking, with the mode and group that are wanted.

    Raises HostError: EX_UNAVAILABLE when a server is alive there, EX_CANTCREAT when the path is
    something else or the folder is not there, EX_NOPERM, EX_CONFIG for an unknown group.
    """
    group = None if wanted.group is None else _group_id(wanted.group)
    path = wanted.path
    with _explained(path):
        stale = _is_stale(path)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        temporary = os.path.join(os.path.dirname(path), f".{secrets.token_hex(3)}")
        try:
            sock.setblocking(False)
            _bind(sock, temporary, wanted.mode)
            try:
                if group is not None:
                    _change_group(temporary, group, wanted)
                sock.listen(BACKLOG)
                status = os.lstat(temporary)
                if stale:
                    os.rename(temporary, path)
                else:
                    os.link(temporary, path)
                    os.unlink(temporary)
            except BaseException:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(temporary)
                raise
        except BaseException:
            sock.close()
            raise
    return PathListener(sock, path, status.st_dev, status.st_ino)


def describe_access(path: str) -> str:
    """Who may connect, for messages: ``srw-rw---- root:kvm /run/vm1.sock``."""
    try:
        status = os.lstat(path)
    except OSError as error:
        return f"{path}: {error.strerror}"
    import grp
    import pwd

    try:
        user = pwd.getpwuid(status.st_uid).pw_name
    except KeyError:
        user = str(status.st_uid)
    try:
        group = grp.getgrgid(status.st_gid).gr_name
    except KeyError:
        group = str(status.st_gid)
    return f"{stat.filemode(status.st_mode)} {user}:{group} {path}"


def _is_stale(path: str) -> bool:
    """True for a socket that nobody listens on, False if there is nothing at `path`."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return False
    if not stat.S_ISSOCK(mode):
        raise HostError(
            f"{path} is {_file_kind(mode)}, not a socket; it is left alone, choose another path",
            exit_code=os.EX_CANTCREAT,
        )
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        result = probe.connect_ex(path)
    match result:
        case errno.ECONNREFUSED:
            return True
        case errno.ENOENT:
            return False
        case 0 | errno.EAGAIN | errno.EPROTOTYPE:
            raise HostError(
                f"{path} belongs to a server that is alive; stop it or choose another path",
                exit_code=os.EX_UNAVAILABLE,
            )
        case _:
            raise HostError(
                f"{path}: " + _CANNOT_TELL.format(os.strerror(result)),
                exit_code=os.EX_NOPERM if result == errno.EACCES else os.EX_UNAVAILABLE,
            )


def _bind(sock: socket.socket, path: str, mode: int | None) -> None:
    if mode is None:
        sock.bind(path)
        return
    before = os.umask(0o777 & ~mode)
    try:
        sock.bind(path)
    finally:
        os.umask(before)


def _group_id(name: str) -> int:
    if name.isdigit():
        return int(name)
    import grp

    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        raise HostError(
            f"there is no group {name!r} for the socket; 'getent group' lists those there are",
            exit_code=os.EX_CONFIG,
        ) from None


def _change_group(path: str, group: int, wanted: SocketPath) -> None:
    try:
        os.chown(path, -1, group, follow_symlinks=False)
    except PermissionError:
        raise HostError(
            f"{wanted.path}: may not give the socket to group {wanted.group}; "
            "run as a member of that group, or as root",
            exit_code=os.EX_NOPERM,
        ) from None


@contextlib.contextmanager
def _explained(path: str) -> Iterator[None]:
    """Turn what the kernel refuses into a HostError with a remedy."""
    folder = os.path.dirname(path) or "."
    try:
        yield
    except PermissionError as error:
        raise HostError(
            f"cannot listen at {path}: {error.strerror}; "
            f"the folder is {describe_access(folder)}; use one that this user may write to",
            exit_code=os.EX_NOPERM,
        ) from None
    except FileExistsError:
        raise HostError(
            f"{path} was made by somebody else just now; start only one server for it",
            exit_code=os.EX_UNAVAILABLE,
        ) from None
    except (FileNotFoundError, NotADirectoryError):
        raise HostError(
            f"cannot listen at {path}: {folder} is not a folder; make it first",
            exit_code=os.EX_CANTCREAT,
        ) from None
    except OSError as error:
        raise HostError(
            f"cannot listen at {path}: {error.strerror or error}; "
            "use a folder that can hold sockets",
            exit_code=os.EX_CANTCREAT,
        ) from None


def _file_kind(mode: int) -> str:
    for test, name in (
        (stat.S_ISLNK, "a symbolic link"),
        (stat.S_ISDIR, "a folder"),
        (stat.S_ISREG, "a file"),
        (stat.S_ISFIFO, "a pipe"),
    ):
        if test(mode):
            return name
    return "a device"
