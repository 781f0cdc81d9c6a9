"""virtio's PCI transport from the driver's side, as far as an owner needs it (virtio 1.4, Virtio
Over PCI Bus; General Initialization And Device Operation).

What `virtio_pci` does in the kernel for a PF, with two differences.  The device is not believed:
capabilities that lead nowhere, queues that are not there and resets that do not end are errors with
a name.  And ACCESS_PLATFORM is insisted on: a device without it may take an address past the IOMMU,
and ours are only good behind it.

Register offsets are those of the standard.  64-bit fields are written in two halves.
"""

from __future__ import annotations

import contextlib
import enum
import struct
from typing import TYPE_CHECKING, Final

import attrs
import trio

from vfio_user_virtio import limits
from vfio_user_virtio.device import VfioRegion
from vfio_user_virtio.errors import ConnectionLost, HostError, RemoteError
from vfio_user_virtio.virtio.common_config import FEATURE_WORDS, Status
from vfio_user_virtio.virtio.features import Feature, feature_names, mask_of
from vfio_user_virtio.virtio.pci_capabilities import VENDOR_CAPABILITY_ID, CfgType

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vfio_user_virtio.backends.vfio.owner_access import FunctionAccess

VIRTIO_VENDOR: Final = 0x1AF4
NO_VENDOR: Final = 0xFFFF
VIRTIO_DEVICES: Final = range(0x1040, 0x1080)
CONFIG_SPACE: Final = 256
COMMAND: Final = 0x04
COMMAND_MEMORY: Final = 1 << 1
COMMAND_MASTER: Final = 1 << 2
CAPABILITIES_POINTER: Final = 0x34
CAP_MSIX: Final = 0x11
MSIX_ENABLE: Final = 1 << 15
GONE: Final = 0xFF
"""What device_status reads when there is no device any more: no driver sets all of its bits."""

REQUIRED: Final = mask_of((Feature.VERSION_1, Feature.ADMIN_VQ))
WELCOME: Final = mask_of((Feature.SR_IOV, Feature.ACCESS_PLATFORM, Feature.ORDER_PLATFORM))

_CAPABILITY: Final = struct.Struct("<BBBBBBxxII")
"""cap_vndr, cap_next, cap_len, cfg_type, bar, id, padding, offset, length."""
_MULTIPLIER: Final = struct.Struct("<I")
_RESET_PAUSE: Final = 0.001


class NotAnOwner(HostError):
    """A function that cannot be an owner of ours: no virtio device that is not transitional, one
    without an administration virtqueue, or one that may go past the IOMMU.  It may be a good device
    all the same; the VFs of it that work cannot migrate."""


class Register(enum.Enum):
    """Fields of the common configuration structure: offset and size in bytes."""

    DEVICE_FEATURE_SELECT = (0, 4)
    DEVICE_FEATURE = (4, 4)
    DRIVER_FEATURE_SELECT = (8, 4)
    DRIVER_FEATURE = (12, 4)
    CONFIG_MSIX_VECTOR = (16, 2)
    NUM_QUEUES = (18, 2)
    DEVICE_STATUS = (20, 1)
    QUEUE_SELECT = (22, 2)
    QUEUE_SIZE = (24, 2)
    QUEUE_MSIX_VECTOR = (26, 2)
    QUEUE_ENABLE = (28, 2)
    QUEUE_NOTIFY_OFF = (30, 2)
    QUEUE_DESC = (32, 8)
    QUEUE_DRIVER = (40, 8)
    QUEUE_DEVICE = (48, 8)
    QUEUE_NOTIF_CONFIG_DATA = (56, 2)
    ADMIN_QUEUE_INDEX = (60, 2)
    ADMIN_QUEUE_NUM = (62, 2)


@attrs.frozen
class Location:
    """A structure at `offset` of BAR `bar`; `multiplier` is notify_off_multiplier."""

    bar: int
    offset: int
    length: int
    multiplier: int = 0


@attrs.frozen
class RingAddresses:
    """A ring of `size` descriptors, by the IOVAs of its three areas."""

    size: int
    desc: int
    driver: int
    device: int


class OwnerTransport:
    """The registers of a PF, called `name` in messages.  All calls raise HostError, and `open`,
    `negotiate` and `admin_queue` NotAnOwner."""

    def __init__(self, access: FunctionAccess, name: str) -> None:
        self.name = name
        self.features = 0
        self.found = False
        """Whether the device's structures are known; nothing is written to a BAR before."""
        self._access = access
        self._common = Location(0, 0, 0)
        self._notify = Location(0, 0, 0)
        self._notify_offset = 0
        self._msix = 0

    async def open(self) -> None:
        """Find the structures, and let the device decode memory and do DMA."""
        with self._naming():
            config = await self._access.region_read(VfioRegion.CONFIG, 0, CONFIG_SPACE)
        vendor, device = struct.unpack_from("<HH", config)
        if vendor == NO_VENDOR:
            raise self.error("the device has gone")
        if vendor != VIRTIO_VENDOR or device not in VIRTIO_DEVICES:
            raise self.no_owner(
                f"{vendor:04x}:{device:04x} is no virtio device that is not transitional "
                "(1af4:1040 to 1af4:107f)"
            )
        positions = capabilities_untrusted(config)
        self._msix = next((p for p in positions if config[p] == CAP_MSIX), 0)
        found = structures_untrusted(config, positions)
        try:
            self._common = found[CfgType.COMMON]
            self._notify = found[CfgType.NOTIFY]
        except KeyError as error:
            raise self.no_owner(f"it has no {CfgType(error.args[0]).name} structure") from None
        self.found = True
        (command,) = struct.unpack_from("<H", config, COMMAND)
        command |= COMMAND_MEMORY | COMMAND_MASTER
        with self._naming():
            await self._access.region_write(
                VfioRegion.CONFIG, COMMAND, command.to_bytes(2, "little")
            )

    async def enable_msix(self) -> None:
        """Set MSI-X Enable, which the kernel's VFIO does itself when it is given eventfds."""
        if self._msix:
            control = self._msix + 2
            with self._naming():
                value = await self._access.region_read(VfioRegion.CONFIG, control, 2)
                enabled = int.from_bytes(value, "little") | MSIX_ENABLE
                await self._access.region_write(
                    VfioRegion.CONFIG, control, enabled.to_bytes(2, "little")
                )

    async def reset(self) -> None:
        """Write device_status 0 and wait until it reads 0."""
        await self.write(Register.DEVICE_STATUS, 0)
        with trio.move_on_after(limits.OWNER_RESET_SECONDS):
            while status := await self.read(Register.DEVICE_STATUS):
                if status == GONE:
                    raise self.error("the device has gone")
                await trio.sleep(_RESET_PAUSE)
            return
        raise self.error(
            f"device_status is not 0 {limits.OWNER_RESET_SECONDS:g} s after a reset; "
            "the device may need a power cycle"
        )

    async def negotiate(self, *, allow_untranslated: bool = False) -> None:
        """From reset to FEATURES_OK, with the features that an owner needs or can use.

        `allow_untranslated`: take a device without ACCESS_PLATFORM.
        """
        await self.write(Register.DEVICE_STATUS, Status.ACKNOWLEDGE)
        await self.write(Register.DEVICE_STATUS, Status.ACKNOWLEDGE | Status.DRIVER)
        offered = await self._offered()
        if missing := REQUIRED & ~offered:
            raise self.no_owner(
                f"it does not offer {', '.join(feature_names(missing))}: "
                "it cannot be the owner of VFs that migrate"
            )
        if not allow_untranslated and not offered & Feature.ACCESS_PLATFORM.mask:
            raise self.no_owner(
                "it does not offer ACCESS_PLATFORM: it may reach memory past the IOMMU; "
                "if it is known not to, allow untranslated access"
            )
        self.features = offered & (REQUIRED | WELCOME)
        for select in range(FEATURE_WORDS):
            await self.write(Register.DRIVER_FEATURE_SELECT, select)
            word = self.features >> 32 * select & 0xFFFF_FFFF
            await self.write(Register.DRIVER_FEATURE, word)
        wanted = Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK
        await self.write(Register.DEVICE_STATUS, wanted)
        if not await self.read(Register.DEVICE_STATUS) & Status.FEATURES_OK:
            names = ", ".join(feature_names(self.features))
            raise self.error(f"it refuses the features {names}, all of which it offers")

    async def admin_queue(self) -> tuple[int, int]:
        """The index of the first administration virtqueue, and its largest size."""
        index = await self.read(Register.ADMIN_QUEUE_INDEX)
        if not await self.read(Register.ADMIN_QUEUE_NUM):
            raise self.no_owner("it offers ADMIN_VQ, but admin_queue_num is 0")
        await self.write(Register.QUEUE_SELECT, index)
        size = await self.read(Register.QUEUE_SIZE)
        if not size:
            raise self.no_owner(f"its administration virtqueue {index} has size 0")
        return index, size

    async def enable_queue(self, index: int, ring: RingAddresses, vector: int) -> None:
        """Give the device a ring, whose interrupts are `vector`."""
        await self.write(Register.QUEUE_SELECT, index)
        await self.write(Register.QUEUE_SIZE, ring.size)
        await self._write_vector(Register.QUEUE_MSIX_VECTOR, vector)
        for register, address in (
            (Register.QUEUE_DESC, ring.desc),
            (Register.QUEUE_DRIVER, ring.driver),
            (Register.QUEUE_DEVICE, ring.device),
        ):
            await self.write(register, address)
        offset = await self.read(Register.QUEUE_NOTIFY_OFF) * self._notify.multiplier
        if offset + 2 > self._notify.length:
            raise self.error(
                f"queue {index} is to be notified at {offset:#x}, outside of the "
                f"{self._notify.length:#x} bytes there are"
            )
        self._notify_offset = self._notify.offset + offset
        await self.write(Register.QUEUE_ENABLE, 1)

    async def set_config_vector(self, vector: int) -> None:
        await self._write_vector(Register.CONFIG_MSIX_VECTOR, vector)

    async def driver_ok(self) -> None:
        status = Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK | Status.DRIVER_OK
        await self.write(Register.DEVICE_STATUS, status)

    async def notify(self, index: int) -> None:
        """Tell the device that the queue that was enabled has new buffers."""
        data = index.to_bytes(2, "little")
        with self._naming():
            await self._access.region_write(self._notify.bar, self._notify_offset, data)

    # --- registers -----------------------------------------------------------------------------

    async def read(self, register: Register) -> int:
        """A field of 1, 2 or 4 bytes."""
        offset, size = register.value
        with self._naming():
            data = await self._access.region_read(
                self._common.bar, self._common.offset + offset, size
            )
        return int.from_bytes(data, "little")

    async def write(self, register: Register, value: int) -> None:
        offset, size = register.value
        for half in range(0, size, 4):
            data = (value >> 8 * half & 0xFFFF_FFFF).to_bytes(min(size, 4), "little")
            with self._naming():
                await self._access.region_write(
                    self._common.bar, self._common.offset + offset + half, data
                )

    def error(self, problem: str) -> HostError:
        return HostError(f"{self.name}: {problem}")

    def no_owner(self, problem: str) -> NotAnOwner:
        return NotAnOwner(f"{self.name}: {problem}")

    async def _offered(self) -> int:
        word = 0
        for select in range(FEATURE_WORDS):
            await self.write(Register.DEVICE_FEATURE_SELECT, select)
            word |= await self.read(Register.DEVICE_FEATURE) << 32 * select
        return word

    async def _write_vector(self, register: Register, vector: int) -> None:
        await self.write(register, vector)
        if await self.read(register) != vector:
            raise self.error(f"it has no room for vector {vector} in {register.name}")

    @contextlib.contextmanager
    def _naming(self) -> Iterator[None]:
        """Have whatever way the device is reached fail in the same way."""
        try:
            yield
        except (RemoteError, ConnectionLost) as error:
            raise self.error(str(error)) from error


def capabilities_untrusted(config: bytes) -> list[int]:
    """Where capabilities are in `config`, the first 256 bytes of configuration space.  A list that
    is a loop or leaves the space ends there."""
    positions: list[int] = []
    position = config[CAPABILITIES_POINTER] & ~3
    while position >= 0x40 and position not in positions:
        positions.append(position)
        position = config[position + 1] & ~3
    return positions


def structures_untrusted(config: bytes, positions: list[int]) -> dict[int, Location]:
    """The first usable structure of each type among the capabilities at `positions`."""
    found: dict[int, Location] = {}
    for position in positions:
        body = config[position : position + _CAPABILITY.size + _MULTIPLIER.size]
        if len(body) < _CAPABILITY.size or body[0] != VENDOR_CAPABILITY_ID:
            continue
        _, _, size, cfg_type, bar, _, offset, length = _CAPABILITY.unpack_from(body)
        multiplier = 0
        if cfg_type == CfgType.NOTIFY and min(size, len(body)) == _CAPABILITY.size + 4:
            (multiplier,) = _MULTIPLIER.unpack_from(body, _CAPABILITY.size)
        if bar <= VfioRegion.BAR5:
            found.setdefault(cfg_type, Location(bar, offset, length, multiplier))
    return found
