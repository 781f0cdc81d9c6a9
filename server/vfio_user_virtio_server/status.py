"""``vfio-user-virtio status``: what a running server does, as its control interface tells.

``--json`` prints one object: ``devices`` as GetDevices answers, with the counters of GetStatistics
as ``counters`` of each; the keys are stable.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from typing import TYPE_CHECKING, Final

import attrs
import trio

from vfio_user_virtio.control.client import ControlClient, control_of
from vfio_user_virtio.control.records import Device, to_json
from vfio_user_virtio.control.varlink import VarlinkError
from vfio_user_virtio.errors import HostError
from vfio_user_virtio_server import log, values
from vfio_user_virtio_server.arguments import argument
from vfio_user_virtio_server.dial import dial

if TYPE_CHECKING:
    import argparse
    from collections.abc import AsyncIterator, Iterator, Sequence

_SECONDS: Final = 5.0
"""How long a server may take to answer."""

_UNITS: Final = ("", " KiB", " MiB", " GiB", " TiB")


@attrs.frozen
class Seen:
    """A device, its counters by group, and when they were read, in seconds."""

    device: Device
    counters: dict[str, dict[str, int]]
    at: float

    def counter(self, group: str, name: str) -> int:
        return self.counters.get(group, {}).get(name, 0)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_control_path(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")


def add_control_path(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--control-path",
        metavar="PATH",
        required=True,
        type=argument(values.parse_socket_path),
        help="the socket of the server's control interface",
    )


def run(options: argparse.Namespace) -> int:
    seen = trio.run(_read_once, options.control_path)
    if options.json:
        devices = [{**to_json(one.device), "counters": one.counters} for one in seen]
        print(json.dumps({"devices": devices}, indent=2))
    else:
        print(*map(log.escape, lines(seen, time.time())), sep="\n")
    return os.EX_OK


async def _read_once(path: str) -> list[Seen]:
    async with connected(path) as control:
        return await read(control)


@contextlib.asynccontextmanager
async def connected(path: str) -> AsyncIterator[ControlClient]:
    """A client of the control interface at `path`.  Raises HostError."""
    async with control_of(await dial(path)) as control:
        yield control


async def read(control: ControlClient) -> list[Seen]:
    """All devices.  Raises HostError, ConnectionLost."""
    try:
        with trio.fail_after(_SECONDS):
            devices = await control.devices()
            statistics = {
                one.device: {counters.group: counters.counts for counters in one.counters}
                for one in await control.statistics()
            }
    except trio.TooSlowError:
        raise HostError(
            f"the server does not answer within {_SECONDS:g} s; is that its control interface?",
            exit_code=os.EX_UNAVAILABLE,
        ) from None
    except VarlinkError as error:
        raise HostError(
            f"the server refuses: {error}; it is of another version", exit_code=os.EX_PROTOCOL
        ) from None
    now = time.monotonic()
    return [Seen(device, statistics.get(device.name, {}), now) for device in devices]


def lines(seen: Sequence[Seen], now: float) -> Iterator[str]:
    """The report for people; `now` in seconds since 1970."""
    for one in seen:
        device = one.device
        yield f"{device.name}: {device.kind}, {device.identity}"
        yield f"    Client: {client(device, now)}"
        if device.memory is not None:
            memory = device.memory
            by_messages = f", {size(memory.remote)} by messages" if memory.remote else ""
            yield (
                f"    Guest memory: {size(memory.mapped)} in {memory.mappings} mappings"
                f"{by_messages}"
            )
        if device.migration is not None:
            yield f"    Migration: {migration(device)}"
        if device.dirty_log != "nobody":
            yield f"    Dirty log: by {device.dirty_log}"
        for group, counts in one.counters.items():
            shown = ", ".join(f"{name} {count}" for name, count in counts.items() if count)
            if shown:
                yield f"    {group}: {shown}"


def client(device: Device, now: float) -> str:
    session = device.session
    if session is None:
        return "none"
    process = "" if session.process is None else f"process {session.process}, "
    version = "no VERSION yet" if session.version is None else f"vfio-user {session.version}"
    return f"{process}{version}, for {duration(now - session.connected)}"


def migration(device: Device) -> str:
    """The state of a device's migration, which must be there."""
    found = device.migration
    assert found is not None
    text = found.state
    if found.holder != "nobody":
        text += f" by {found.holder}"
    if found.read or found.to_read:
        text += f", {size(found.read)} read, {size(found.to_read)} to read"
    if found.loaded:
        text += f", {size(found.loaded)} loaded"
    return text


def duration(seconds: float) -> str:
    """In the two largest of days, hours, minutes and seconds."""
    left = max(int(seconds), 0)
    parts: list[str] = []
    for unit, length in (("d", 86_400), ("h", 3_600), ("min", 60), ("s", 1)):
        count, left = divmod(left, length)
        if count or (unit == "s" and not parts):
            parts.append(f"{count} {unit}")
    return " ".join(parts[:2])


def size(count: float) -> str:
    """Bytes, as people say them."""
    for unit in _UNITS:
        if count < 1024 or unit == _UNITS[-1]:
            break
        count /= 1024
    return f"{count:.0f}{unit}" if count >= 100 or not unit else f"{count:.3g}{unit}"
