"""``vfio-user-virtio migrate-vm``: a running guest goes to another QEMU, with our devices.

Stock QEMU moves a VM with vfio-user devices and leaves the devices behind.  This is the command
line of `vm.move`, which does it whole; see there for what happens when.  Both QEMUs and all servers
are reached by UNIX sockets, so two hosts need theirs forwarded, and ``--channel``.

The QEMUs' monitors serve one client at a time each: give this command its own (``-qmp unix:…``).
Nothing else is needed of either; the target waits with ``-incoming defer``.

Which device of the guest is which of a server follows from the process that is the server's client,
if there is one device each; otherwise ``--device`` says it.

Ctrl-C and SIGTERM cancel: the source runs on, the target ends.  Once that runs it is too late.

``--json`` prints one object: ``from``, ``to``, ``devices`` (each with ``id``, ``from``, ``to``,
``image_bytes``, ``written_bytes`` and ``logged``; that is false where nobody can tell which pages
it writes, and it was stopped before the memory was copied), ``phases`` (each with ``name`` and
``seconds``), ``seconds``, ``stopped_seconds`` (of the phases in which the guest did not run, but
for QEMU's ``switch over``), ``downtime_seconds`` (by the clocks of the QEMUs; null if unknown) and
``failed`` (what could not be ended, in words).  These keys are stable.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import struct
import sys
from typing import TYPE_CHECKING, Final

import attrs
import trio

from vfio_user_virtio.errors import HostError
from vfio_user_virtio_server import log, values
from vfio_user_virtio_server.arguments import argument
from vfio_user_virtio_server.dial import dial
from vfio_user_virtio_server.vm.control import connect_server
from vfio_user_virtio_server.vm.move import (
    PRE_COPY,
    STOPPED,
    SWITCH_OVER,
    Move,
    MovedDevice,
    Place,
)
from vfio_user_virtio_server.vm.qemu import Qemu
from vfio_user_virtio_server.vm.qmp import open_qmp

if TYPE_CHECKING:
    import argparse
    from collections.abc import AsyncIterator, Iterator, Sequence

    from vfio_user_virtio_server.vm.control import ServedDevice, ServerControl

_CLEAR_LINE: Final = "\r\33[K"
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
    parser.add_argument("--json", action="store_true", help="print JSON")


def parse_device(text: str) -> NamedDevice:
    """``ID=NAME`` or ``ID=NAME:NAME``.  Raises ValueError."""
    ident, _, names = text.partition("=")
    source, _, target = names.partition(":")
    if not ident or not source:
        raise ValueError(f"{text!r} is not ID=NAME or ID=NAME:NAME, as in vf1=vm1")
    return NamedDevice(ident, source, target or source)


def run(options: argparse.Namespace) -> int:
    if options.from_qmp == options.to_qmp:
        raise HostError("--from-qmp and --to-qmp are the same", exit_code=os.EX_USAGE)
    attempt = Attempt(options)
    cancelled_by = trio.run(attempt.run)
    if cancelled_by is not None:
        print(f"vfio-user-virtio: cancelled; {attempt.standing}", file=sys.stderr)
        return 128 + cancelled_by
    done = attempt.move
    assert done is not None
    if options.json:
        print(json.dumps(described(options, done), indent=2))
    else:
        print(*(log.escape(line) for line in lines(options, done)), sep="\n")
    return os.EX_OK


class Attempt:
    """The one move that `options` ask for; `move` is there once all four ends answer."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.move: Move | None = None
        self._options = options
        self._cancellable = trio.CancelScope()

    @property
    def standing(self) -> str:
        """Where the guest is now."""
        return "nothing was changed" if self.move is None else self.move.standing

    async def run(self) -> int | None:
        """Move; the signal that cancelled it, or None when it is done.  Raises HostError."""
        caught: list[int] = []
        failure: HostError | None = None
        with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._cancel_on_signal, signals, caught)
                with self._cancellable:
                    try:
                        await self._move()
                    except HostError as error:
                        failure = error
                nursery.cancel_scope.cancel()
        if failure is not None:
            step = "" if self.move is None else f"{self.move.step}: "
            raise HostError(
                f"{step}{failure}; {self.standing}", exit_code=failure.exit_code
            ) from failure
        too_late = self.move is not None and self.move.target_runs
        return caught[0] if caught and not too_late else None

    async def _move(self) -> None:
        options = self._options
        async with contextlib.AsyncExitStack() as stack:
            progress = _ProgressLine()

            def show(step: str) -> None:
                if step == PRE_COPY and self.move is not None:
                    progress.clear()
                    print(*notes(self.move), sep="", end="", file=sys.stderr)
                progress.show(step)

            stack.callback(progress.clear)
            sides = []
            for name, path, controls in (
                ("source", options.from_qmp, options.from_control),
                ("target", options.to_qmp, options.to_control),
            ):
                sock = await dial(path)
                process = _peer(sock)
                qmp = await stack.enter_async_context(open_qmp(sock, f"the {name}'s QEMU"))
                servers = [
                    await stack.enter_async_context(connect_server(control)) for control in controls
                ]
                sides.append((Qemu(qmp), Served(servers, process)))
            (source, here), (target, there) = sides
            self.move = Move(
                source,
                target,
                await _devices(options.device, source, here, there),
                channel=options.channel,
                offline=options.offline,
                keep_source=options.keep_source,
                on_step=show,
            )
            await self.move.run()

    async def _cancel_on_signal(self, signals: AsyncIterator[int], caught: list[int]) -> None:
        async for number in signals:
            caught.append(number)
            self._cancellable.cancel()


# --- which device is which ----------------------------------------------------------------------


@attrs.frozen
class Served:
    """The servers of one side, and the pid of its QEMU, None if that cannot be told."""

    servers: Sequence[ServerControl]
    process: int | None

    async def named(self, name: str) -> Place:
        """Raises HostError."""
        found = [place for place, device in await self._all() if device.name == name]
        return _only(found, f"called {name}")

    async def only(self) -> Place:
        """The one device whose client is this side's QEMU.  Raises HostError."""
        found = await self._all()
        mine = [place for place, device in found if device.process == self.process]
        return _only(mine or [place for place, _ in found], "of this guest")

    async def _all(self) -> list[tuple[Place, ServedDevice]]:
        return [
            (Place(server, device.name), device)
            for server in self.servers
            for device in await server.devices()
        ]


def _only(found: list[Place], which: str) -> Place:
    if len(found) != 1:
        names = ", ".join(place.device for place in found) or "none"
        raise HostError(
            f"devices of the servers {which}: {names}; name each with --device ID=NAME",
            exit_code=os.EX_USAGE,
        )
    return found[0]


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


class _ProgressLine:
    """The step, in one line on standard error, if that is a terminal."""

    def __init__(self) -> None:
        self._on = sys.stderr.isatty()

    def show(self, step: str) -> None:
        if self._on:
            self._write(f"{_CLEAR_LINE}{step} ...")

    def clear(self) -> None:
        if self._on:
            self._write(_CLEAR_LINE)

    def _write(self, text: str) -> None:
        sys.stderr.write(text)
        sys.stderr.flush()


# --- the report ---------------------------------------------------------------------------------


def notes(move: Move) -> Iterator[str]:
    """What to know before it takes its time; each line is ended."""
    for one in move.devices:
        if not one.logged:
            yield (
                f"vfio-user-virtio: {one.ident}: the IOMMU of the source's host cannot tell which "
                "pages it writes, so the guest is stopped before its memory is copied\n"
            )


def stopped_seconds(done: Move) -> float:
    """What our own steps add to QEMU's downtime."""
    return sum(
        phase.seconds
        for phase in done.phases
        if phase.name in STOPPED and phase.name != SWITCH_OVER
    )


def described(options: argparse.Namespace, done: Move) -> dict[str, object]:
    """For programs."""
    return {
        "from": options.from_qmp,
        "to": options.to_qmp,
        "devices": [
            {
                "id": one.ident,
                "from": one.source.device,
                "to": one.target.device,
                "image_bytes": len(one.stream),
                "written_bytes": one.written_bytes,
                "logged": one.logged,
            }
            for one in done.devices
        ],
        "phases": [attrs.asdict(phase) for phase in done.phases],
        "seconds": sum(phase.seconds for phase in done.phases),
        "stopped_seconds": stopped_seconds(done),
        "downtime_seconds": done.downtime,
        "failed": done.failed,
    }


def lines(options: argparse.Namespace, done: Move) -> Iterator[str]:
    """For people."""
    total = sum(phase.seconds for phase in done.phases)
    down = "unknown" if done.downtime is None else _ms(done.downtime)
    yield (
        f"{options.from_qmp} to {options.to_qmp} in {_ms(total)}, downtime {down}, "
        f"of which for the devices {_ms(stopped_seconds(done))}"
    )
    for phase in done.phases:
        yield f"    {phase.name:<18}{_ms(phase.seconds):>12}"
    for one in done.devices:
        wrote = f"{one.written_bytes:,} that it wrote to the guest's memory"
        if not one.logged:
            wrote = "stopped before the guest's memory was copied"
        yield f"    {one.ident}: {len(one.stream):,} bytes of its own, {wrote}"
    yield f"    {done.standing}"


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.2f} ms"
