"""The methods of the control interface, over any number of devices.

A method is a coroutine from checked parameters to the parameters of its last reply; what comes
before goes through `Turn.emit`, if the caller wants more than one reply.  Bulk goes in pieces of
`limits.CONTROL_CHUNK`, so that a message is never larger than a peer takes, and others get their
turn between two of them.

Guest memory is read and written as the device itself would, by the client's mappings; nothing is
promised about what the guest does to it meanwhile.
"""

from __future__ import annotations

import base64
import binascii
import struct
from importlib import metadata
from typing import TYPE_CHECKING, Final, Protocol, cast

import attrs
import trio

from vfio_user_virtio import limits
from vfio_user_virtio.control import varlink
from vfio_user_virtio.control.idl import MismatchError
from vfio_user_virtio.control.interface import CONTROL, INTERFACES, SERVICE
from vfio_user_virtio.control.records import Mapping, Pages, Range, from_json, to_json
from vfio_user_virtio.control.varlink import VarlinkError
from vfio_user_virtio.device import U64_END, DmaAccess, LoggingReport
from vfio_user_virtio.protocol.migration import MigrationState

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Sequence

    from vfio_user_virtio.control.device_control import Caller, DeviceControl
    from vfio_user_virtio.control.varlink import Call, Json, Object

VENDOR: Final = "vfio-user-virtio"
PRODUCT: Final = "vfio-user-virtio serve"


class Emit(Protocol):
    """Sends a reply that others follow."""

    async def __call__(self, parameters: Object) -> None: ...


@attrs.frozen(eq=False)
class Turn:
    """One call: who calls, with which parameters; `emit` is None for a caller that wants but one
    reply."""

    service: ControlService
    caller: Caller
    parameters: Object
    emit: Emit | None

    @property
    def device(self) -> DeviceControl:
        return self.service.device(self.text("device"))

    def text(self, name: str) -> str:
        return cast("str", self.parameters[name])

    @property
    def keep(self) -> bool:
        return bool(self.parameters.get("keep"))

    def ranges(self, name: str) -> list[Range]:
        """The ranges in a parameter; none if it is absent.  Raises InvalidParameter."""
        found = from_json(list[Range], self.parameters.get(name) or [])
        for one in found:
            _check_range(one, name)
        return found

    def more(self) -> Emit:
        """Raises ExpectedMore for a caller that takes one reply only."""
        if self.emit is None:
            raise VarlinkError(varlink.EXPECTED_MORE)
        return self.emit


class ControlService:
    """`devices`, in the order in which they are shown."""

    def __init__(self, devices: Sequence[DeviceControl]) -> None:
        self._devices = {device.name: device for device in devices}

    @property
    def devices(self) -> list[DeviceControl]:
        return list(self._devices.values())

    def device(self, name: str) -> DeviceControl:
        found = self._devices.get(name)
        if found is None:
            raise VarlinkError(f"{CONTROL.name}.DeviceNotFound", {"device": name})
        return found

    async def answer_untrusted(self, call: Call, caller: Caller, emit: Emit) -> Object:
        """Carry a call out; the parameters of its last reply.  Raises VarlinkError."""
        interface = INTERFACES.get(call.interface)
        if interface is None:
            raise VarlinkError(varlink.INTERFACE_NOT_FOUND, {"interface": call.interface})
        method = interface.methods.get(call.name)
        if method is None:
            raise VarlinkError(varlink.METHOD_NOT_FOUND, {"method": call.method})
        if call.upgrade:
            raise VarlinkError(varlink.METHOD_NOT_IMPLEMENTED, {"method": call.method})
        try:
            interface.check_untrusted(method.parameters, dict(call.parameters), strict=True)
        except MismatchError as error:
            raise _invalid(error.path) from error
        turn = Turn(self, caller, call.parameters, emit if call.more else None)
        return await _METHODS[call.method](turn)

    async def caller_is_gone(self, caller: Caller) -> None:
        for device in self._devices.values():
            await device.caller_is_gone(caller)


# --- org.varlink.service ------------------------------------------------------------------------


async def _get_info(turn: Turn) -> Object:
    return {
        "vendor": VENDOR,
        "product": PRODUCT,
        "version": version(),
        "url": "",
        "interfaces": [*INTERFACES],
    }


async def _get_interface_description(turn: Turn) -> Object:
    name = turn.text("interface")
    if name not in INTERFACES:
        raise VarlinkError(varlink.INTERFACE_NOT_FOUND, {"interface": name})
    return {"description": INTERFACES[name].text}


def version() -> str:
    """That of the package; empty where it runs from its source."""
    try:
        return metadata.version("vfio-user-virtio")
    except metadata.PackageNotFoundError:
        return ""


# --- what there is ------------------------------------------------------------------------------


async def _get_devices(turn: Turn) -> Object:
    return {"devices": [to_json(device.status()) for device in turn.service.devices]}


async def _get_device(turn: Turn) -> Object:
    return {"device": to_json(turn.device.status())}


async def _get_statistics(turn: Turn) -> Object:
    named = turn.parameters.get("device")
    devices = turn.service.devices if named is None else [turn.device]
    return {"statistics": [to_json(device.statistics()) for device in devices]}


# --- migration ----------------------------------------------------------------------------------


async def _go(turn: Turn, state: MigrationState) -> None:
    async with turn.device.migration(turn.caller, keep=turn.keep) as migration:
        if migration.state is not state:
            await migration.set_state(state)


async def _quiesce(turn: Turn) -> Object:
    await _go(turn, MigrationState.STOP)
    return {}


async def _resume(turn: Turn) -> Object:
    await _go(turn, MigrationState.RUNNING)
    return {}


async def _release(turn: Turn) -> Object:
    await turn.device.release(turn.caller)
    return {}


async def _set_migration_state(turn: Turn) -> Object:
    await _go(turn, MigrationState[turn.text("state")])
    return _migration(turn)


async def _get_precopy_info(turn: Turn) -> Object:
    async with turn.device.migration(turn.caller) as migration:
        info = await migration.precopy_info()
    return {"initial": info.initial_bytes, "dirty": info.dirty_bytes}


async def _get_image_size(turn: Turn) -> Object:
    async with turn.device.migration(turn.caller) as migration:
        return {"size": await migration.data_size()}


async def _read_image(turn: Turn) -> Object:
    device = turn.device
    while True:
        async with device.migration(turn.caller) as migration:
            piece = migration.read(limits.CONTROL_CHUNK)
        data: Object = {"data": base64.b64encode(piece).decode()}
        if turn.emit is None or not piece:
            return data
        await turn.emit(data)


async def _write_image(turn: Turn) -> Object:
    data = _bytes(turn.text("data"), "data")
    async with turn.device.migration(turn.caller) as migration:
        await migration.write(data)
    return _migration(turn)


def _migration(turn: Turn) -> Object:
    return {"migration": to_json(turn.device.migration_status())}


# --- dirty log ----------------------------------------------------------------------------------


async def _start_dirty_log(turn: Turn) -> Object:
    turn.device.start_log(turn.caller, turn.ranges("ranges"), keep=turn.keep)
    return {}


async def _stop_dirty_log(turn: Turn) -> Object:
    turn.device.stop_log(turn.caller)
    return {}


async def _report_dirty_log(turn: Turn) -> Object:
    device, emit = turn.device, turn.more()
    wanted = turn.parameters.get("range")
    if wanted is None:
        ranges = _joined([Range(one.iova, one.size) for one in device.guest_pages().mappings()])
    else:
        ranges = [from_json(Range, wanted)]
        _check_range(ranges[0], "range")
    found: list[Range] = []
    for one in ranges:
        end = one.iova + one.size
        for start in range(one.iova, end, limits.DIRTY_REPORT_BYTES):
            size = min(limits.DIRTY_REPORT_BYTES, end - start)
            bitmap = device.report_log(turn.caller, LoggingReport(start, size, limits.PAGE_SIZE))
            for first, count in bitmap_runs(bitmap):
                found.append(Range(start + first * limits.PAGE_SIZE, count * limits.PAGE_SIZE))
                if len(found) == limits.CONTROL_RANGES:
                    await emit({"ranges": [to_json(part) for part in found]})
                    found.clear()
            await trio.lowlevel.checkpoint()
    return {"ranges": [to_json(part) for part in found]}


def bitmap_runs(bitmap: bytes) -> Iterator[tuple[int, int]]:
    """The runs of bits that are set in little-endian u64 words: first bit and how many."""
    begun = position = 0
    inside = False
    for (word,) in struct.iter_unpack("<Q", bitmap):
        if word != (_ALL_BITS if inside else 0):
            for bit in range(64):
                if bool(word >> bit & 1) != inside:
                    if inside:
                        yield begun, position + bit - begun
                    begun, inside = position + bit, not inside
        position += 64
    if inside:
        yield begun, position - begun


_ALL_BITS: Final = (1 << 64) - 1


# --- guest memory -------------------------------------------------------------------------------


async def _get_mappings(turn: Turn) -> Object:
    emit = turn.more()
    mappings = turn.device.guest_pages().mappings()
    shown: list[Json] = [
        to_json(
            Mapping(
                iova=one.iova,
                size=one.size,
                read=DmaAccess.READ in one.access,
                write=DmaAccess.WRITE in one.access,
                file=one.file,
            )
        )
        for one in mappings
    ]
    while len(shown) > limits.CONTROL_RANGES:
        await emit({"mappings": shown[: limits.CONTROL_RANGES]})
        del shown[: limits.CONTROL_RANGES]
    return {"mappings": shown}


async def _read_memory(turn: Turn) -> Object:
    ranges = turn.ranges("ranges")
    if turn.emit is None and sum(one.size for one in ranges) > limits.CONTROL_CHUNK:
        turn.more()
    batch: list[Range] = []
    room = limits.CONTROL_CHUNK
    for one in ranges:
        position, left = one.iova, one.size
        while left:
            size = min(room, left)
            batch.append(Range(position, size))
            position, left, room = position + size, left - size, room - size
            if turn.emit is not None and (not room or len(batch) == limits.CONTROL_RANGES):
                await turn.emit(await _pages(turn.device, batch))
                batch, room = [], limits.CONTROL_CHUNK
    return await _pages(turn.device, batch)


async def _pages(device: DeviceControl, ranges: list[Range]) -> Object:
    data = base64.b64encode(await device.read_memory(ranges)).decode()
    return {"pages": to_json(Pages(ranges, data))}


async def _write_memory(turn: Turn) -> Object:
    pages = from_json(Pages, turn.parameters["pages"])
    data = _bytes(pages.data, "pages")
    for one in pages.ranges:
        _check_range(one, "pages")
    if sum(one.size for one in pages.ranges) != len(data):
        raise _invalid("pages")
    await turn.device.write_memory(pages.ranges, memoryview(data))
    return {"size": len(data)}


async def _replay(turn: Turn) -> Object:
    turn.device.replay()
    return {}


async def _announce(turn: Turn) -> Object:
    turn.device.announce()
    return {}


def _check_range(one: Range, name: str) -> None:
    if one.iova < 0 or one.size < 1 or one.iova + one.size > U64_END:
        raise _invalid(name)


def _bytes(text: str, name: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise _invalid(name) from None


def _joined(ranges: list[Range]) -> list[Range]:
    """Neighbours as one; in the order of addresses."""
    found: list[Range] = []
    for one in ranges:
        if found and found[-1].iova + found[-1].size == one.iova:
            found[-1] = Range(found[-1].iova, found[-1].size + one.size)
        else:
            found.append(one)
    return found


def _invalid(parameter: str) -> VarlinkError:
    return VarlinkError(varlink.INVALID_PARAMETER, {"parameter": parameter})


_METHODS: Final[dict[str, Callable[[Turn], Awaitable[Object]]]] = {
    f"{SERVICE.name}.GetInfo": _get_info,
    f"{SERVICE.name}.GetInterfaceDescription": _get_interface_description,
    f"{CONTROL.name}.GetDevices": _get_devices,
    f"{CONTROL.name}.GetDevice": _get_device,
    f"{CONTROL.name}.GetStatistics": _get_statistics,
    f"{CONTROL.name}.Quiesce": _quiesce,
    f"{CONTROL.name}.Resume": _resume,
    f"{CONTROL.name}.Release": _release,
    f"{CONTROL.name}.SetMigrationState": _set_migration_state,
    f"{CONTROL.name}.GetPrecopyInfo": _get_precopy_info,
    f"{CONTROL.name}.GetImageSize": _get_image_size,
    f"{CONTROL.name}.ReadImage": _read_image,
    f"{CONTROL.name}.WriteImage": _write_image,
    f"{CONTROL.name}.StartDirtyLog": _start_dirty_log,
    f"{CONTROL.name}.StopDirtyLog": _stop_dirty_log,
    f"{CONTROL.name}.ReportDirtyLog": _report_dirty_log,
    f"{CONTROL.name}.GetMappings": _get_mappings,
    f"{CONTROL.name}.ReadMemory": _read_memory,
    f"{CONTROL.name}.WriteMemory": _write_memory,
    f"{CONTROL.name}.Replay": _replay,
    f"{CONTROL.name}.Announce": _announce,
}
