"""The devices of a transfer by their servers' control interface: a VM may be using them.

The source's guest is stopped by whoever moves it, before its device is; if that has begun to log
what the device writes (``StartDirtyLog`` with ``keep``), those pages go with it.  What is begun
here ends with the connection, so that the source runs on even if this process is killed.

A call that is given up leaves a connection that cannot be used again, and with it the way back; so
calls are not cancelled, and have their time instead.
"""

from __future__ import annotations

import base64
import contextlib
import os
from typing import TYPE_CHECKING, Final

import attrs
import trio

from vfio_user_virtio.control import records
from vfio_user_virtio.control.records import Range
from vfio_user_virtio.control.varlink import VarlinkError
from vfio_user_virtio.errors import ConnectionLost, HostError
from vfio_user_virtio.limits import CONTROL_CHUNK, CONTROL_RANGES, PAGE_SIZE
from vfio_user_virtio.migration.preflight import Preflight
from vfio_user_virtio.migration.transfer_frames import DeviceFacts, Pages, ZeroPages
from vfio_user_virtio.protocol.migration import MigrationFlags, MigrationState

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterable, Iterator

    from vfio_user_virtio.control.client import ControlClient
    from vfio_user_virtio.control.records import Migration
    from vfio_user_virtio.protocol.header import Buffer

_ZERO_PAGE: Final = bytes(PAGE_SIZE)
_HELD: Final = "control"
_BATCH: Final = 8 * CONTROL_CHUNK
"""Bytes of guest memory that are held at once."""


@attrs.define
class _Controlled:
    """Device `name` of the server behind `client`."""

    client: ControlClient
    name: str
    answer_seconds: float
    state: MigrationState | None = MigrationState.RUNNING
    """None if it is not known."""
    begun: bool = attrs.field(init=False, default=False)

    async def facts(self) -> DeviceFacts:
        """Raises HostError if the device cannot migrate, or does so already."""
        with self._call("GetDevice"):
            device = await self.client.device(self.name)
        migration = device.migration
        if "migration" not in device.abilities or migration is None:
            raise HostError(
                f"{self.name} does not offer migration; its server's log may say why",
                exit_code=os.EX_UNAVAILABLE,
            )
        if migration.holder != "nobody" or migration.state != MigrationState.RUNNING.name:
            raise HostError(
                f"{self.name} is in state {migration.state}, and {migration.holder} has its "
                "migration in hand",
                exit_code=os.EX_UNAVAILABLE,
            )
        return DeviceFacts(_options(migration), None, self.name)

    async def set_state(self, state: MigrationState, *, keep: bool = False) -> None:
        self.begun = True
        self.state = None
        with self._call(f"SetMigrationState {state.name}"):
            await self.client.set_migration_state(self.name, state.name, keep=keep)
        self.state = state

    async def release(self) -> None:
        """Let the device run as it did before, if anything was begun."""
        if self.begun:
            with self._call("Release"):
                await self.client.release(self.name)
            self.state = MigrationState.RUNNING

    async def read(self) -> bytes:
        with self._call("ReadImage"):
            return await self.client.read_image(self.name)

    @contextlib.contextmanager
    def _call(self, what: str) -> Iterator[None]:
        patience = trio.CancelScope(shield=True, deadline=trio.current_time() + self.answer_seconds)
        try:
            with patience:
                yield
        except VarlinkError as error:
            raise HostError(f"{self.name}: {what}: {error}", exit_code=os.EX_IOERR) from None
        except ConnectionLost as error:
            raise ConnectionLost(f"{self.name}: {what}: {error}") from error
        if patience.cancelled_caught:
            raise ConnectionLost(f"{self.name}: no answer to {what} in {self.answer_seconds:g} s")


@attrs.define
class ControlSource(_Controlled):
    """`ends.Source`."""

    async def prepare(self) -> DeviceFacts:
        return await self.facts()

    async def start_precopy(self) -> None:
        await self.set_state(MigrationState.PRE_COPY)

    async def look_for_more(self) -> None:
        with self._call("GetPrecopyInfo"):
            await self.client.precopy_info(self.name)

    async def stop(self) -> None:
        await self.set_state(MigrationState.STOP_COPY)

    async def changed_pages(self) -> AsyncGenerator[Pages | ZeroPages, None]:
        with self._call("GetDevice"):
            logs = (await self.client.device(self.name)).dirty_log == _HELD
        if not logs:
            return
        with self._call("ReportDirtyLog"):
            ranges = await self.client.report_dirty_log(self.name)
        for part in batches(ranges):
            for pages in await self._read_memory(part):
                for frame in frames_untrusted(pages):
                    yield frame

    async def finish(self, *, keep: bool) -> None:
        if keep:
            await self.release()
        else:
            await self.set_state(MigrationState.STOP, keep=True)

    async def run_on(self) -> None:
        await self.release()

    async def _read_memory(self, ranges: list[Range]) -> list[records.Pages]:
        with self._call(f"ReadMemory from {ranges[0].iova:#x} on"):
            async with self.client.reading_memory(self.name, ranges) as replies:
                return [pages async for pages in replies]


@attrs.define
class ControlTarget(_Controlled):
    """`ends.Target`."""

    _preflight: Preflight = attrs.field(init=False, factory=Preflight)
    _ranges: list[Range] = attrs.field(init=False, factory=list)
    _data: bytearray = attrs.field(init=False, factory=bytearray)
    """Pages that are not written yet, since many go into one call."""

    async def prepare(self) -> DeviceFacts:
        facts = await self.facts()
        await self.set_state(MigrationState.STOP_COPY)
        self._preflight.target_saves_untrusted(await self.read())
        await self.release()
        await self.set_state(MigrationState.RESUMING)
        return facts

    async def write(self, data: Buffer) -> None:
        self._preflight.source_saves_untrusted(data)
        with self._call(f"WriteImage of {len(data)} bytes"):
            await self.client.write_image(self.name, bytes(data))

    async def write_pages(self, pages: Pages | ZeroPages) -> None:
        size = pages.size if isinstance(pages, ZeroPages) else len(pages.data)
        for start in range(0, size, CONTROL_CHUNK):
            length = min(CONTROL_CHUNK, size - start)
            if len(self._data) + length > CONTROL_CHUNK or len(self._ranges) == CONTROL_RANGES:
                await self._write_memory()
            self._ranges.append(Range(pages.iova + start, length))
            if isinstance(pages, ZeroPages):
                self._data += bytes(length)
            else:
                self._data += pages.data[start : start + length]

    async def _write_memory(self) -> None:
        if not self._ranges:
            return
        pages = records.Pages(self._ranges, base64.b64encode(self._data).decode())
        what = f"WriteMemory of {len(self._data)} bytes from {self._ranges[0].iova:#x} on"
        self._ranges, self._data = [], bytearray()
        with self._call(what):
            await self.client.write_pages(self.name, pages)

    async def load(self) -> None:
        await self._write_memory()
        await self.set_state(MigrationState.STOP)

    async def run(self) -> None:
        self.state = None
        with self._call("Resume"):
            await self.client.resume(self.name)
        self.state = MigrationState.RUNNING

    async def give_up(self) -> None:
        await self.release()


def batches(ranges: Iterable[Range]) -> Iterator[list[Range]]:
    """`ranges` in parts that are read at once: `_BATCH` bytes or `CONTROL_RANGES` at most."""
    part: list[Range] = []
    size = 0
    for one in ranges:
        for start in range(0, one.size, _BATCH):
            length = min(_BATCH, one.size - start)
            if part and (size + length > _BATCH or len(part) == CONTROL_RANGES):
                yield part
                part, size = [], 0
            part.append(Range(one.iova + start, length))
            size += length
    if part:
        yield part


def frames_untrusted(pages: records.Pages) -> Iterator[Pages | ZeroPages]:
    """A reply of ReadMemory as frames.  Raises ConnectionLost for one that makes no sense."""
    try:
        data = base64.b64decode(pages.data, validate=True)
    except ValueError:
        data = b""
    if sum(one.size for one in pages.ranges) != len(data):
        raise ConnectionLost("the server's reply to ReadMemory has not the bytes of its ranges")
    position = 0
    for one in pages.ranges:
        yield from split_pages(one.iova, data[position : position + one.size])
        position += one.size


def split_pages(iova: int, data: bytes) -> Iterator[Pages | ZeroPages]:
    """Whole pages from `iova` on, as frames: runs of those that are zero, and runs of others."""
    begun, position, zero = 0, 0, False
    while position < len(data):
        page = data[position : position + PAGE_SIZE]
        if (page == _ZERO_PAGE) is not zero or position == 0:
            yield from _run(iova, data, begun, position, zero=zero)
            begun, zero = position, page == _ZERO_PAGE
        position += PAGE_SIZE
    yield from _run(iova, data, begun, position, zero=zero)


def _run(
    iova: int, data: bytes, begun: int, end: int, *, zero: bool
) -> Iterator[Pages | ZeroPages]:
    if begun < end:
        yield ZeroPages(iova + begun, end - begun) if zero else Pages(iova + begun, data[begun:end])


def _options(migration: Migration) -> MigrationFlags:
    found = MigrationFlags(0)
    for name in migration.options:
        found |= MigrationFlags.__members__.get(name, MigrationFlags(0))
    return found
