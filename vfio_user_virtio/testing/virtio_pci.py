"""virtio's PCI transport, driver side, over a vfio-user client (virtio 1.4, Virtio Over PCI Bus).

Why: what Linux's virtio_pci_modern does through QEMU, a test does here in one process and sees
every step of: find the structures by their capabilities, negotiate, set queues up, take
interrupts, and reset in each of the ways there are.  Register offsets are written out from the
standard, not taken from the device side, so that neither hides a mistake of the other.

Every access is a message: REGION_READ or REGION_WRITE of the BAR or of configuration space.
"""

from __future__ import annotations

import enum
import struct
from typing import TYPE_CHECKING, Final, Protocol

import attrs
import trio

from vfio_user_virtio.device import IrqAction, IrqRequest, VfioIrq, VfioRegion
from vfio_user_virtio.testing.driver_queue import DeviceBroke
from vfio_user_virtio.testing.interrupt import Interrupt
from vfio_user_virtio.virtio.common_config import NO_VECTOR, Status
from vfio_user_virtio.virtio.features import Feature, feature_names
from vfio_user_virtio.virtio.pci_capabilities import VENDOR_CAPABILITY_ID, CfgType

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vfio_user_virtio.testing.driver_queue import Ring

COMMAND: Final = 0x04
COMMAND_MEMORY: Final = 1 << 1
COMMAND_BUS_MASTER: Final = 1 << 2
COMMAND_INTX_DISABLE: Final = 1 << 10
CAPABILITIES_POINTER: Final = 0x34
CAP_POWER_MANAGEMENT: Final = 0x01
CAP_PCI_EXPRESS: Final = 0x10
CAP_MSIX: Final = 0x11
MSIX_ENABLE: Final = 1 << 15
INITIATE_FLR: Final = 1 << 15
STARTED: Final = Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK | Status.DRIVER_OK

_CAPABILITY: Final = struct.Struct("<BBBBBB2xII")
"""cap_vndr, cap_next, cap_len, cfg_type, bar, id, offset, length."""
_EVENTFDS_PER_MESSAGE: Final = 8
_RESET_POLLS: Final = 2000


class PciClient(Protocol):
    """The part of a vfio-user client that a PCI driver needs."""

    async def region_read(self, index: int, offset: int, count: int) -> bytes: ...

    async def region_write(
        self, index: int, offset: int, data: bytes, *, no_reply: bool = False
    ) -> None: ...

    async def set_irqs(self, request: IrqRequest) -> None:
        """Send SET_IRQS; the eventfds stay the caller's."""
        ...


class Register(enum.Enum):
    """Fields of the common configuration structure: offset and size in bytes."""

    DEVICE_FEATURE_SELECT = (0, 4)
    DEVICE_FEATURE = (4, 4)
    DRIVER_FEATURE_SELECT = (8, 4)
    DRIVER_FEATURE = (12, 4)
    CONFIG_MSIX_VECTOR = (16, 2)
    NUM_QUEUES = (18, 2)
    DEVICE_STATUS = (20, 1)
    CONFIG_GENERATION = (21, 1)
    QUEUE_SELECT = (22, 2)
    QUEUE_SIZE = (24, 2)
    QUEUE_MSIX_VECTOR = (26, 2)
    QUEUE_ENABLE = (28, 2)
    QUEUE_NOTIFY_OFF = (30, 2)
    QUEUE_DESC = (32, 8)
    QUEUE_DRIVER = (40, 8)
    QUEUE_DEVICE = (48, 8)
    QUEUE_NOTIF_CONFIG_DATA = (56, 2)
    QUEUE_RESET = (58, 2)
    ADMIN_QUEUE_INDEX = (60, 2)
    ADMIN_QUEUE_NUM = (62, 2)


class FeaturesRefused(Exception):
    """The device did not keep FEATURES_OK."""


@attrs.frozen
class VirtioCapability:
    """A vendor capability of virtio at `position` of configuration space.

    `multiplier` is notify_off_multiplier, 0 for other types.
    """

    position: int
    cfg_type: int
    bar: int
    offset: int
    length: int
    multiplier: int = 0


def find_capabilities(config: bytes) -> tuple[dict[int, int], list[VirtioCapability]]:
    """Walk the capability list in `config`, the first 256 bytes or more of configuration space.

    Where the first capability of each ID is, and virtio's in the order of the list.  Raises
    DeviceBroke for a list that is a loop or leaves the space.
    """
    first: dict[int, int] = {}
    virtio: list[VirtioCapability] = []
    position = config[CAPABILITIES_POINTER] & ~3
    seen: set[int] = set()
    while position:
        if position in seen or not 0x40 <= position <= 0xF0:
            raise DeviceBroke(f"the capability list goes to {position:#x} after {sorted(seen)}")
        seen.add(position)
        first.setdefault(config[position], position)
        if config[position] == VENDOR_CAPABILITY_ID:
            _, _, size, cfg_type, bar, _, offset, length = _CAPABILITY.unpack_from(config, position)
            multiplier = 0
            if cfg_type == CfgType.NOTIFY and size >= 20:
                (multiplier,) = struct.unpack_from("<I", config, position + 16)
            virtio.append(VirtioCapability(position, cfg_type, bar, offset, length, multiplier))
        position = config[position + 1] & ~3
    return first, virtio


class VirtioPci:
    """A virtio function behind `client`.  Make one with `open`."""

    def __init__(
        self, client: PciClient, first: dict[int, int], virtio: list[VirtioCapability]
    ) -> None:
        self.client = client
        self.pci_capabilities = first
        self.capabilities = virtio
        self.common = self.structure(CfgType.COMMON)
        self.notify_structure = self.structure(CfgType.NOTIFY)
        self.isr_structure = self.structure(CfgType.ISR)
        self.features = 0
        self._notify_off: dict[int, int] = {}
        self._interrupts: list[Interrupt] = []
        self._armed = VfioIrq.MSIX
        """Which index `_interrupts` are of."""

    @classmethod
    async def open(cls, client: PciClient) -> VirtioPci:
        """Find the structures and turn memory decoding and bus mastering on.

        Raises DeviceBroke if a structure that every device has is missing.
        """
        first, virtio = find_capabilities(await client.region_read(VfioRegion.CONFIG, 0, 256))
        pci = cls(client, first, virtio)
        await pci.set_up()
        return pci

    async def set_up(self) -> None:
        """Turn memory decoding and bus mastering on: at first, and after FLR or D3hot."""
        await self.config_write(COMMAND, COMMAND_MEMORY | COMMAND_BUS_MASTER, 2)

    def structure(self, cfg_type: CfgType) -> VirtioCapability:
        """The first capability of that type.  Raises DeviceBroke if there is none."""
        for capability in self.capabilities:
            if capability.cfg_type == cfg_type:
                return capability
        raise DeviceBroke(f"the device has no {cfg_type.name} structure")

    # --- registers -----------------------------------------------------------------------------

    async def config_read(self, offset: int, size: int) -> int:
        data = await self.client.region_read(VfioRegion.CONFIG, offset, size)
        return int.from_bytes(data, "little")

    async def config_write(self, offset: int, value: int, size: int) -> None:
        data = value.to_bytes(size, "little")
        await self.client.region_write(VfioRegion.CONFIG, offset, data)

    async def read(self, register: Register) -> int:
        offset, size = register.value
        if size == 8:
            raise ValueError(f"{register.name} is read as two halves; use read_half")
        return await self._bar_read(self.common, offset, size)

    async def write(self, register: Register, value: int) -> None:
        """Write a field, a 64-bit one as two halves, low first, as Linux does."""
        offset, size = register.value
        if size == 8:
            await self._bar_write(self.common, offset, value & 0xFFFF_FFFF, 4)
            await self._bar_write(self.common, offset + 4, value >> 32, 4)
        else:
            await self._bar_write(self.common, offset, value, size)

    async def read_half(self, register: Register, half: int) -> int:
        """The low (0) or high (1) 32 bits of a 64-bit field."""
        return await self._bar_read(self.common, register.value[0] + 4 * half, 4)

    async def _bar_read(self, structure: VirtioCapability, offset: int, size: int) -> int:
        data = await self.client.region_read(structure.bar, structure.offset + offset, size)
        return int.from_bytes(data, "little")

    async def _bar_write(
        self, structure: VirtioCapability, offset: int, value: int, size: int
    ) -> None:
        data = value.to_bytes(size, "little")
        await self.client.region_write(structure.bar, structure.offset + offset, data)

    async def access_read(self, bar: int, offset: int, size: int) -> int:
        """Read `size` bytes (1, 2 or 4) of a BAR through VIRTIO_PCI_CAP_PCI_CFG."""
        window = await self._aim(bar, offset, size)
        return await self.config_read(window, size)

    async def access_write(self, bar: int, offset: int, value: int, size: int) -> None:
        """Write `size` bytes (1, 2 or 4) of a BAR through VIRTIO_PCI_CAP_PCI_CFG."""
        window = await self._aim(bar, offset, size)
        await self.config_write(window, value, size)

    async def _aim(self, bar: int, offset: int, size: int) -> int:
        position = self.structure(CfgType.PCI).position
        await self.config_write(position + 4, bar, 1)
        await self.config_write(position + 8, offset, 4)
        await self.config_write(position + 12, size, 4)
        return position + 16

    async def device_config(self, offset: int, size: int) -> bytes:
        """`size` bytes of the device's own structure, all of one config_generation."""
        device = self.structure(CfgType.DEVICE)
        while True:
            before = await self.read(Register.CONFIG_GENERATION)
            data = await self.client.region_read(device.bar, device.offset + offset, size)
            if await self.read(Register.CONFIG_GENERATION) == before:
                return data

    # --- life of the device --------------------------------------------------------------------

    async def status(self) -> Status:
        return Status(await self.read(Register.DEVICE_STATUS))

    async def set_status(self, status: Status) -> None:
        await self.write(Register.DEVICE_STATUS, status)

    async def offered(self) -> int:
        """The feature word that the device offers, 128 bits of it."""
        word = 0
        for select in range(4):
            await self.write(Register.DEVICE_FEATURE_SELECT, select)
            word |= await self.read(Register.DEVICE_FEATURE) << 32 * select
        return word

    async def negotiate(self, features: int) -> None:
        """Reset the device and ask for exactly `features`.

        Raises FeaturesRefused, naming them, if the device does not take them.
        """
        await self.reset()
        await self.set_status(Status.ACKNOWLEDGE)
        await self.set_status(Status.ACKNOWLEDGE | Status.DRIVER)
        for select in range(4):
            await self.write(Register.DRIVER_FEATURE_SELECT, select)
            await self.write(Register.DRIVER_FEATURE, features >> 32 * select & 0xFFFF_FFFF)
        await self.set_status(Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK)
        if not await self.status() & Status.FEATURES_OK:
            raise FeaturesRefused(", ".join(feature_names(features)))
        self.features = features

    async def driver_ok(self) -> None:
        """Start the device; queues must be set up."""
        await self.set_status(STARTED)

    async def reset(self) -> None:
        """Write device_status 0 and wait until it reads 0.  Raises DeviceBroke if it does not."""
        await self.set_status(Status(0))
        await self._until_reset()

    async def function_level_reset(self) -> None:
        """Initiate FLR in the PCI Express capability, and wait until it is done.

        The function is to be set up anew (`set_up`), and interrupts to be taken.
        """
        control = self.pci_capabilities[CAP_PCI_EXPRESS] + 8
        await self.config_write(control, await self.config_read(control, 2) | INITIATE_FLR, 2)
        await self._until_reset()

    async def set_power_state(self, state: int) -> None:
        """Move the function to D0 (0) or D3hot (3) by its PMCSR."""
        control = self.pci_capabilities[CAP_POWER_MANAGEMENT] + 4
        await self.config_write(control, await self.config_read(control, 2) & ~3 | state, 2)

    async def _until_reset(self) -> None:
        for _ in range(_RESET_POLLS):
            if not await self.status():
                return
            await trio.sleep(0.001)
        raise DeviceBroke("device_status is not 0 long after a reset")

    # --- queues --------------------------------------------------------------------------------

    async def queue_size(self, index: int) -> int:
        """The size of queue `index` as the register has it; 0 if there is no such queue."""
        await self.write(Register.QUEUE_SELECT, index)
        return await self.read(Register.QUEUE_SIZE)

    async def enable_queue(
        self,
        index: int,
        ring: Ring,
        *,
        vector: int = NO_VECTOR,
        instead: Mapping[Register, int] | None = None,
    ) -> None:
        """Give `ring` to the device as queue `index`, and enable it.

        `instead` has other values for some of QUEUE_DESC, QUEUE_DRIVER and QUEUE_DEVICE, for
        tests of what a device does about addresses that are wrong.
        """
        addresses = {
            Register.QUEUE_DESC: ring.desc,
            Register.QUEUE_DRIVER: ring.driver,
            Register.QUEUE_DEVICE: ring.device,
            **(instead or {}),
        }
        await self.write(Register.QUEUE_SELECT, index)
        await self.write(Register.QUEUE_SIZE, ring.size)
        await self.write(Register.QUEUE_MSIX_VECTOR, vector)
        if await self.read(Register.QUEUE_MSIX_VECTOR) != vector:
            raise DeviceBroke(f"queue {index} did not take vector {vector}")
        for register, address in addresses.items():
            await self.write(register, address)
        self._notify_off[index] = await self.read(Register.QUEUE_NOTIFY_OFF)
        await self.write(Register.QUEUE_ENABLE, 1)

    async def reset_queue(self, index: int) -> None:
        """RING_RESET: take queue `index` back.  Raises DeviceBroke if the device keeps it."""
        await self.write(Register.QUEUE_SELECT, index)
        await self.write(Register.QUEUE_RESET, 1)
        for _ in range(_RESET_POLLS):
            if not await self.read(Register.QUEUE_RESET):
                break
            await trio.sleep(0.001)
        if await self.read(Register.QUEUE_ENABLE):
            raise DeviceBroke(f"queue {index} is still enabled after its reset")

    async def notify(self, index: int, next_available: int = 0) -> None:
        """Tell the device that queue `index` has buffers.

        With NOTIFICATION_DATA the message carries `next_available`, the driver's avail idx.  It is
        a posted write, as QEMU's are: this does not wait for the device.
        """
        structure = self.notify_structure
        offset = structure.offset + self._notify_off[index] * structure.multiplier
        data = index.to_bytes(2, "little")
        if self.features & Feature.NOTIFICATION_DATA.mask:
            data += next_available.to_bytes(2, "little")
        await self.client.region_write(structure.bar, offset, data, no_reply=True)

    # --- interrupts ----------------------------------------------------------------------------

    async def msix_vectors(self) -> int:
        """How many vectors the MSI-X table has; 0 without the capability."""
        position = self.pci_capabilities.get(CAP_MSIX)
        return 0 if position is None else (await self.config_read(position + 2, 2) & 0x7FF) + 1

    async def take_msix(self, vectors: int) -> list[Interrupt]:
        """Enable MSI-X and arm vectors 0 … `vectors` - 1, as QEMU does; closed by `close`."""
        self.close()
        control = self.pci_capabilities[CAP_MSIX] + 2
        await self.config_write(control, await self.config_read(control, 2) | MSIX_ENABLE, 2)
        self._interrupts = [Interrupt() for _ in range(vectors)]
        self._armed = VfioIrq.MSIX
        await self.arm(self.client)
        return self._interrupts

    async def take_intx(self) -> Interrupt:
        """Arm INTx; each interrupt is acknowledged by reading ISR status, and unmasked."""
        self.close()

        async def acknowledge() -> None:
            await self.isr()
            await self.client.set_irqs(IrqRequest(VfioIrq.INTX, 0, 1, IrqAction.UNMASK))

        self._interrupts = [Interrupt(acknowledge)]
        self._armed = VfioIrq.INTX
        await self.arm(self.client)
        return self._interrupts[0]

    async def arm(self, client: PciClient) -> None:
        """Give the eventfds of the interrupts that were taken to `client`, as well or again."""
        for start in range(0, len(self._interrupts), _EVENTFDS_PER_MESSAGE):
            batch = self._interrupts[start : start + _EVENTFDS_PER_MESSAGE]
            eventfds = tuple(interrupt.fd for interrupt in batch)
            await client.set_irqs(
                IrqRequest(self._armed, start, len(eventfds), IrqAction.TRIGGER, eventfds=eventfds)
            )

    @staticmethod
    async def disarm(client: PciClient) -> None:
        """Take all eventfds of MSI-X and INTx from `client`."""
        for index in (VfioIrq.MSIX, VfioIrq.INTX):
            await client.set_irqs(IrqRequest(index, 0, 0, IrqAction.TRIGGER))

    async def release_interrupts(self) -> None:
        """Disable MSI-X and INTx, and close the eventfds."""
        await self.disarm(self.client)
        position = self.pci_capabilities.get(CAP_MSIX)
        if position is not None:
            control = await self.config_read(position + 2, 2)
            await self.config_write(position + 2, control & ~MSIX_ENABLE, 2)
        self.close()

    async def isr(self) -> int:
        """Read, and so clear, ISR status: bit 0 a queue, bit 1 the configuration."""
        return await self._bar_read(self.isr_structure, 0, 1)

    def close(self) -> None:
        """Close this side's eventfds."""
        for interrupt in self._interrupts:
            interrupt.close()
        self._interrupts = []
