"""``vfio-user-virtio migrate-vm``: a running guest goes to another QEMU, with our devices.

Stock QEMU moves a VM with vfio-user devices and leaves the devices behind.  This is the command
line of `vm.move`, which does it whole; see there for what happens when.  Both QEMUs and all servers
are reached by UNIX sockets, so two hosts need theirs forwarded, and ``--channel``; see `vm.qtest`
for the third one of the other host (``--from-qtest``, ``--to-qtest``).

The QEMUs' monitors serve one client at a time each: give this command its own (``-qmp unix:…``).
Nothing else is needed of either; the target waits with ``-incoming defer``.

Which device of the guest is which of a server follows from the process that is the server's client,
if there is one device each; otherwise ``--device`` says it.

Ctrl-C and SIGTERM cancel: the source runs on, the target ends.  Once that runs it is too late.

``--json`` prints one object: ``from``, ``to``, ``devices`` (each with ``id``, ``from``, ``to``,
``image_bytes``, ``written_bytes`` and ``logged``; that is false where nobody can tell which pages
it writes, and it was stopped before the memory was copied), ``phases`` (each with ``name``,
``start``, ``seconds``, ``byte_count``, and as ``page_count`` the pages that QEMU was told to send
again), ``seconds``, ``stopped_seconds`` (of the phases in which the guest did not run, but for
QEMU's ``switch over``), ``downtime_seconds`` (by the clocks of the QEMUs; null if unknown),
``packets`` (with ``--ping``: ``sent``, ``unanswered``, ``slowest`` and ``silence``, the longest
time without an answer, in seconds) and ``failed`` (what could not be ended, in words).  These keys
are stable.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
import sys
from typing import TYPE_CHECKING, Final

import attrs
import trio

from vfio_user_virtio.errors import HostError
from vfio_user_virtio_server import log, report, values
from vfio_user_virtio_server.arguments import argument
from vfio_user_virtio_server.cancellable import run_cancellable
from vfio_user_virtio_server.dial import dial
from vfio_user_virtio_server.pings import open_pinger
from vfio_user_virtio_server.progress import ProgressLine
from vfio_user_virtio_server.vm.account import Account, notes, progress
from vfio_user_virtio_server.vm.control import connect_server
from vfio_user_virtio_server.vm.move import PRE_COPY, Move, MovedDevice, Place
from vfio_user_virtio_server.vm.qemu import Qemu
from vfio_user_virtio_server.vm.qmp import open_qmp
from vfio_user_virtio_server.vm.qtest import Forwarded
from vfio_user_virtio_server.vm.take_back import take_back_by

if TYPE_CHECKING:
    import argparse
    from collections.abc import AsyncIterator, Sequence

    from vfio_user_virtio_server.cancellable import Cancellable
    from vfio_user_virtio_server.pings import Pinger
    from vfio_user_virtio_server.report import Report
    from vfio_user_virtio_server.vm.control import ServedDevice, ServerControl

BEFORE_SECONDS: Final = 0.5
AFTER_SECONDS: Final = 1.0
"""How long packets are sent beyond the move, to compare."""

_UCRED: Final = struct.Struct("3i")


@attrs.frozen
class NamedDevice:
    """``--device``: a device's id in QEMU, and its names at both servers."""

    ident: str
    source: str
    target: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Move a running guest from one stock QEMU to another, with the devices that our servers "
        "serve to both.  The target has been started like the source, with -incoming defer and "
        "sockets of its own.  If anything fails, the source runs on and the target is ended."
    )
    for side, what in (("from", "source"), ("to", "target")):
        parser.add_argument(
            f"--{side}-qmp",
            metavar="PATH",
            required=True,
            type=argument(values.parse_socket_path),
            help=f"monitor of the {what}'s QEMU",
        )
        parser.add_argument(
            f"--{side}-control",
            metavar="PATH",
            required=True,
            action="append",
            type=argument(values.parse_socket_path),
            help=f"control socket of the {what}'s server; once for each server",
        )
        parser.add_argument(
            f"--{side}-qtest",
            metavar="HERE:THERE",
            type=argument(parse_forwarded),
            help=f"a path that leads to one on the {what}'s host, if that is another one",
        )
    parser.add_argument(
        "--device",
        metavar="ID=NAME[:NAME]",
        action="append",
        default=[],
        type=argument(parse_device),
        help="a device's id in QEMU and its names at the servers; once for each device",
    )
    parser.add_argument(
        "--channel",
        metavar="URI",
        help="where the QEMUs meet, such as tcp:HOST:PORT (default: a socket pair, on one host)",
    )
    parser.add_argument("--offline", action="store_true", help="stop the guest first, then move it")
    parser.add_argument(
        "--keep-source",
        action="store_true",
        help="leave the source's QEMU stopped; otherwise it is ended",
    )
    parser.add_argument(
        "--take-back",
        action="store_true",
        help="do not move it: let it run at the source again, and end the target, after a "
        "migrate-vm with the same sockets was killed",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--report",
        metavar="FILE",
        type=argument(report.check_path),
        help="draw a time line of the move there, as .html or .svg, also if it fails",
    )
    parser.add_argument(
        "--ping",
        metavar="ADDRESS",
        help="send echo requests to the guest meanwhile, and tell what becomes of them",
    )


def parse_device(text: str) -> NamedDevice:
    """``ID=NAME`` or ``ID=NAME:NAME``.  Raises ValueError."""
    ident, _, names = text.partition("=")
    source, _, target = names.partition(":")
    if not ident or not source:
        raise ValueError(f"{text!r} is not ID=NAME or ID=NAME:NAME, as in vf1=vm1")
    return NamedDevice(ident, source, target or source)


def parse_forwarded(text: str) -> Forwarded:
    """``HERE:THERE``, as ``ssh -L`` has it.  Raises ValueError."""
    here, _, there = text.partition(":")
    if not here or not there.startswith("/"):
        raise ValueError(f"{text!r} is not HERE:THERE, the latter an absolute path")
    return Forwarded(values.parse_socket_path(here), values.parse_socket_path(there))


def run(options: argparse.Namespace) -> int:
    if options.from_qmp == options.to_qmp:
        raise HostError("--from-qmp and --to-qmp are the same", exit_code=os.EX_USAGE)
    if options.take_back:
        source = (options.from_qmp, options.from_qtest, options.from_control)
        print(trio.run(take_back_by, *source, options.to_qmp))
        return os.EX_OK
    if (options.from_qtest or options.to_qtest) and options.channel is None:
        raise HostError("two hosts need a --channel, as tcp:HOST:PORT", exit_code=os.EX_USAGE)
    attempt = Attempt(options)
    with report.kept(options.report, attempt.drawn):
        run_cancellable(attempt.run, lambda: attempt.standing, lambda: attempt.too_late)
        done = attempt.move
        assert done is not None
        if options.json:
            print(json.dumps(attempt.account.described(done), indent=2))
        else:
            print(*(log.escape(line) for line in attempt.account.lines(done)), sep="\n")
    return os.EX_OK


class Attempt:
    """The one move that `options` ask for; `move` is there once all four ends answer."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.move: Move | None = None
        self.account = Account(options.from_qmp, options.to_qmp)
        self._options = options
        self._progress = ProgressLine()

    @property
    def standing(self) -> str:
        """Where the guest is now."""
        return "nothing was changed" if self.move is None else self.move.standing

    @property
    def too_late(self) -> bool:
        return self.move is not None and self.move.target_runs

    def drawn(self, failure: HostError | None) -> Report:
        """For `report`."""
        return self.account.drawn(self.move, str(failure or ""))

    async def run(self, cancellable: Cancellable) -> None:
        """Raises HostError, with the step that failed if it came to that."""
        try:
            async with self._pinging(cancellable):
                await self._move()
        except HostError as error:
            if self.move is None:
                raise
            what = f"{self.move.step}: {error}"
            raise HostError(what, exit_code=error.exit_code) from error

    @contextlib.asynccontextmanager
    async def _pinging(self, cancellable: Cancellable) -> AsyncIterator[None]:
        """Echo requests before, meanwhile and after, if there is anyone to send them to."""
        if self._options.ping is None:
            yield
            return
        async with open_pinger(self._options.ping) as pinger:
            self.account = attrs.evolve(self.account, pings=pinger.pings)
            cancellable.beside.start_soon(pinger.run)
            await pinger.answered()
            await trio.sleep(BEFORE_SECONDS)
            try:
                yield
            except HostError:
                with trio.CancelScope(shield=True):  # a signal now must not hide what failed
                    await _last_of(pinger)
                raise
            await _last_of(pinger)

    async def _move(self) -> None:
        options = self._options
        async with contextlib.AsyncExitStack() as stack:
            stack.callback(self._progress.clear)
            sides = []
            for name, path, controls, forwarded in (
                ("source", options.from_qmp, options.from_control, options.from_qtest),
                ("target", options.to_qmp, options.to_control, options.to_qtest),
            ):
                sock = await dial(path)
                process = _peer(sock)
                qmp = await stack.enter_async_context(open_qmp(sock, f"the {name}'s QEMU"))
                servers = [
                    await stack.enter_async_context(connect_server(control)) for control in controls
                ]
                sides.append((Qemu(qmp, forwarded), Served(servers, process)))
            (source, here), (target, there) = sides
            self.move = Move(
                source,
                target,
                await _devices(options.device, source, here, there),
                channel=options.channel,
                offline=options.offline,
                keep_source=options.keep_source,
                on_step=self._show,
                on_look=self._show_more,
            )
            await self.move.run()

    def _show(self, step: str) -> None:
        if step == PRE_COPY and self.move is not None:
            self._progress.clear()
            print(*notes(self.move), sep="", end="", file=sys.stderr)
        self._progress.say(step, "...")

    def _show_more(self) -> None:
        if self.move is not None:
            self._progress.say(PRE_COPY, progress(self.move))


async def _last_of(pinger: Pinger) -> None:
    await trio.sleep(AFTER_SECONDS)
    await pinger.settle()


# --- which device is which ----------------------------------------------------------------------


@attrs.frozen
class Served:
    """The servers of one side, and the pid of its QEMU, None if that cannot be told."""

    servers: Sequence[ServerControl]
    process: int | None

    async def named(self, name: str) -> Place:
        """`name` may have the number of its server before it, as in 2/device.  Raises HostError."""
        found = [
            (shown, place)
            for shown, place, device in await self._all()
            if name in (shown, device.name)
        ]
        return _only(found, f"called {name}")

    async def only(self) -> Place:
        """The one device whose client is this side's QEMU.  Raises HostError."""
        found = await self._all()
        mine = [one[:2] for one in found if one[2].process == self.process]
        return _only(mine or [one[:2] for one in found], "of this guest")

    async def _all(self) -> list[tuple[str, Place, ServedDevice]]:
        """Each with what it may be named by."""
        found = []
        for number, server in enumerate(self.servers, 1):
            for device in await server.devices():
                shown = f"{number}/{device.name}" if len(self.servers) > 1 else device.name
                found.append((shown, Place(server, device.name), device))
        return found


def _only(found: list[tuple[str, Place]], which: str) -> Place:
    if len(found) != 1:
        names = ", ".join(shown for shown, _ in found) or "none"
        raise HostError(
            f"devices of the servers {which}: {names}; name each with --device ID=NAME",
            exit_code=os.EX_USAGE,
        )
    return found[0][1]


async def _devices(
    named: Sequence[NamedDevice], source: Qemu, here: Served, there: Served
) -> list[MovedDevice]:
    if named:
        return [
            MovedDevice(one.ident, await here.named(one.source), await there.named(one.target))
            for one in named
        ]
    idents = list((await source.facts()).devices)
    if len(idents) != 1:
        raise HostError(
            f"vfio-user devices of the source: {', '.join(idents) or 'none'}; "
            "name each with --device ID=NAME",
            exit_code=os.EX_USAGE,
        )
    return [MovedDevice(idents[0], await here.only(), await there.only())]


def _peer(sock: socket.socket) -> int | None:
    """The process that listens at the other end, if it can be told."""
    data = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    process = int(_UCRED.unpack(data)[0])
    return process or None
