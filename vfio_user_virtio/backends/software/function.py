"""The PCI function of a member: what its regions contain and how it interrupts.

Regions, laid out as QEMU's own virtio-net-pci has them:

    BAR1  4 KiB, 32-bit    MSI-X table at 0, pending bits at 0x800
    BAR4  16 KiB, 64-bit   common configuration 0x0000, ISR 0x1000, legacy notification 0x1800,
                           device configuration 0x2000, notification 0x3000, four bytes per queue
    configuration space    PCI Express, power management, MSI-X and the virtio capabilities

None may be mapped by the client: a region with the mmap flag would make QEMU wait for the reply to
every write, and a kick is a write.

The function knows virtio's transport, not the network device: that is behind `FunctionDevice`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Protocol

from vfio_user_virtio.backends.software.interrupts import Interrupts
from vfio_user_virtio.device import (
    DeviceFlags,
    DeviceInfo,
    RegionFlags,
    RegionInfo,
    VfioRegion,
    WithoutMigration,
)
from vfio_user_virtio.pci.config_space import (
    CONFIG_SIZE,
    Command,
    ConfigEvents,
    ConfigSpace,
    Identity,
    MemoryBar,
)
from vfio_user_virtio.pci.msix import ENTRY_SIZE, MsixCapability, msix_table
from vfio_user_virtio.pci.pcie_capability import add_pcie_capability
from vfio_user_virtio.pci.power_management import PowerManagement, PowerState
from vfio_user_virtio.virtio.common_config import (
    COMMON_CONFIG_SIZE,
    CommonConfig,
    Consequences,
)
from vfio_user_virtio.virtio.pci_capabilities import (
    CfgType,
    Structure,
    add_config_access,
    add_notify_structure,
    add_structure,
)

if TYPE_CHECKING:
    from vfio_user_virtio.device import IrqInfo, IrqRequest

VIRTIO_VENDOR: Final = 0x1AF4
VIRTIO_NET_DEVICE: Final = 0x1041
CLASS_ETHERNET: Final = 0x020000
REVISION: Final = 1
SUBSYSTEM: Final = 0x1100

MSIX_BAR: Final = VfioRegion.BAR1
MSIX_BAR_SIZE: Final = 0x1000
PBA_OFFSET: Final = 0x800
VIRTIO_BAR: Final = VfioRegion.BAR4
VIRTIO_BAR_SIZE: Final = 0x4000
COMMON: Final = Structure(CfgType.COMMON, VIRTIO_BAR, 0x0000, COMMON_CONFIG_SIZE)
ISR: Final = Structure(CfgType.ISR, VIRTIO_BAR, 0x1000, 1)
DEVICE: Final = Structure(CfgType.DEVICE, VIRTIO_BAR, 0x2000, 0x1000)
NOTIFY: Final = Structure(CfgType.NOTIFY, VIRTIO_BAR, 0x3000, 0x1000)
NOTIFY_MULTIPLIER: Final = 4
LEGACY_NOTIFY: Final = ISR.offset + 0x800
"""Where in `VIRTIO_BAR` a queue's index, two bytes, notifies that queue (LEGACY_NOTIFY_INFO)."""

NUM_REGIONS: Final = 9
NUM_IRQS: Final = 5

ISR_QUEUE: Final = 1
ISR_CONFIG: Final = 2

_READ_WRITE: Final = RegionFlags.READ | RegionFlags.WRITE
_REGIONS: Final = {
    MSIX_BAR: RegionInfo(MSIX_BAR_SIZE, _READ_WRITE),
    VIRTIO_BAR: RegionInfo(VIRTIO_BAR_SIZE, _READ_WRITE),
    VfioRegion.CONFIG: RegionInfo(CONFIG_SIZE, _READ_WRITE),
}
_ABSENT: Final = RegionInfo(0, RegionFlags(0))


class FunctionConfig(Protocol):
    """What is fixed for the function's life: see `MemberConfig`."""

    @property
    def offered(self) -> int: ...

    @property
    def num_queues(self) -> int: ...

    @property
    def queue_size(self) -> int: ...

    @property
    def num_vectors(self) -> int: ...


class FunctionDevice(Consequences, Protocol):
    """The device inside the function."""

    def device_config(self) -> bytes:
        """The device-specific configuration."""
        ...

    def config_events(self, events: ConfigEvents) -> None:
        """Configuration space was written; resets have to be carried out, too."""
        ...

    def kick(self, queue: int) -> None:
        """The driver notified `queue`, which may not exist."""
        ...


class Function:
    """One virtio PCI function."""

    def __init__(
        self, config: FunctionConfig, device: FunctionDevice, *, admin_queues: int = 0
    ) -> None:
        self._device = device
        self.interrupts: Final = Interrupts(config.num_vectors)
        self.common: Final = CommonConfig(
            offered=config.offered,
            num_queues=config.num_queues,
            queue_size=config.queue_size,
            num_vectors=config.num_vectors,
            consequences=device,
            admin_queues=admin_queues,
        )
        self.isr = 0
        self.config: Final = ConfigSpace(
            Identity(
                VIRTIO_VENDOR,
                VIRTIO_NET_DEVICE,
                CLASS_ETHERNET,
                REVISION,
                VIRTIO_VENDOR,
                SUBSYSTEM,
            ),
            {
                MSIX_BAR: MemoryBar(MSIX_BAR_SIZE),
                VIRTIO_BAR: MemoryBar(VIRTIO_BAR_SIZE, is_64bit=True, prefetchable=True),
            },
        )
        self._table = msix_table(config.num_vectors)
        self._msix = MsixCapability(
            self.config,
            config.num_vectors,
            table_bar=MSIX_BAR,
            table_offset=0,
            pba_bar=MSIX_BAR,
            pba_offset=PBA_OFFSET,
        )
        add_structure(self.config, COMMON)
        add_notify_structure(self.config, NOTIFY, NOTIFY_MULTIPLIER)
        add_structure(self.config, ISR)
        add_structure(self.config, DEVICE)
        add_config_access(self.config, self._window_read, self._window_write)
        add_pcie_capability(self.config)
        self._power = PowerManagement(self.config)
        self.msix_enabled = False
        """Whether the driver has MSI-X on."""
        self.may_dma = False
        """Whether the function is in D0 with bus mastering on."""

    # --- what the client sees ------------------------------------------------------------------

    def info(self) -> DeviceInfo:
        return DeviceInfo(DeviceFlags.RESET | DeviceFlags.PCI, NUM_REGIONS, NUM_IRQS)

    def region_info(self, index: int) -> RegionInfo:
        return _REGIONS.get(VfioRegion(index), _ABSENT)

    def read(self, region: int, offset: int, count: int) -> bytes:
        """`count` bytes of `region`; what is not implemented reads 0."""
        if region == VIRTIO_BAR:
            return self._read_virtio(offset, count)
        if region == VfioRegion.CONFIG:
            return self.config.read(offset, count)
        if region == MSIX_BAR:
            return self._read_msix(offset, count)
        return bytes(count)

    def write(self, region: int, offset: int, data: bytes | memoryview) -> None:
        """Write `data`; what is not implemented or read-only ignores it."""
        if region == VIRTIO_BAR:
            self._write_virtio(offset, data)
        elif region == VfioRegion.CONFIG:
            self._write_config(offset, data)
        elif region == MSIX_BAR and offset + len(data) <= self._table.size:
            self._table.write(offset, data)

    # --- interrupts ----------------------------------------------------------------------------

    def interrupt_queue(self, index: int) -> None:
        """Tell the driver that queue `index` has used buffers."""
        if self.msix_enabled:
            self.interrupts.trigger(self.common.state.queues[index].msix_vector)
        else:
            self._assert_intx(ISR_QUEUE)

    def interrupt_config(self) -> None:
        """Tell the driver that the configuration or the status has changed."""
        if self.msix_enabled:
            self.isr |= ISR_CONFIG
            self.interrupts.trigger(self.common.state.config_msix_vector)
        else:
            self._assert_intx(ISR_CONFIG)

    def interrupt_all(self) -> None:
        """Send one interrupt for each queue in use, and one for the configuration."""
        for index, queue in enumerate(self.common.state.queues):
            if queue.enabled:
                self.interrupt_queue(index)
        self.interrupt_config()

    def _assert_intx(self, cause: int) -> None:
        self.isr |= cause
        self.config.set_interrupt_status(True)
        self.interrupts.set_intx_level(True)

    def read_isr(self) -> bytes:
        """The ISR status, which reading clears; INTx is deasserted."""
        value, self.isr = self.isr, 0
        self.config.set_interrupt_status(False)
        self.interrupts.set_intx_level(False)
        return bytes((value,))

    # --- resets --------------------------------------------------------------------------------

    def reset(self) -> None:
        """Everything as at power on: configuration space, virtio registers, interrupts."""
        self.config.reset()
        self._table.reset()
        self.common.reset()
        self.reset_transport()
        self._config_changed()

    def reset_transport(self) -> None:
        """What a virtio device reset clears beside the common configuration."""
        self.isr = 0
        self.config.set_interrupt_status(False)
        self.interrupts.reset()

    # --- regions -------------------------------------------------------------------------------

    def _read_virtio(self, offset: int, count: int) -> bytes:
        page = offset & ~0xFFF
        within = offset & 0xFFF
        if page == COMMON.offset:
            return self.common.read(within, count)
        if page == DEVICE.offset:
            data = self._device.device_config()
        elif page == ISR.offset and within == 0:
            data = self.read_isr()
        else:
            return bytes(count)
        return data[within : within + count].ljust(count, b"\0")

    def _write_virtio(self, offset: int, data: bytes | memoryview) -> None:
        if offset >= NOTIFY.offset:
            self._device.kick((offset - NOTIFY.offset) // NOTIFY_MULTIPLIER)
        elif offset < ISR.offset:
            self.common.write_untrusted(offset, data)
        elif offset == LEGACY_NOTIFY:
            self._device.kick(int.from_bytes(data[:2], "little"))

    def _read_msix(self, offset: int, count: int) -> bytes:
        if offset + count <= self._table.size:
            return self._table.read(offset, count)
        pending = self.interrupts.pending
        if offset >= PBA_OFFSET and offset + count <= PBA_OFFSET + pending.size:
            return pending.read(offset - PBA_OFFSET, count)
        return bytes(count)

    def _write_config(self, offset: int, data: bytes | memoryview) -> None:
        events = self.config.write(offset, data)
        if events:
            self._config_changed()
            self._device.config_events(events)

    def _config_changed(self) -> None:
        command = self.config.command
        self.may_dma = bool(command & Command.MASTER) and self._power.state is PowerState.D0
        self.msix_enabled = self._msix.enabled
        self.interrupts.set_intx_disabled(bool(command & Command.INTX_DISABLE))

    def _window_read(self, bar: int, offset: int, count: int) -> bytes:
        if offset + count > self._bar_size(bar):
            return bytes(count)
        return self.read(bar, offset, count)

    def _window_write(self, bar: int, offset: int, data: bytes) -> None:
        if offset + len(data) <= self._bar_size(bar):
            self.write(bar, offset, data)

    @staticmethod
    def _bar_size(bar: int) -> int:
        return _REGIONS[VfioRegion(bar)].size if bar in (MSIX_BAR, VIRTIO_BAR) else 0


class FunctionFront(WithoutMigration):
    """The part of a `Device` that is its `function` and no more."""

    function: Function

    def device_info(self) -> DeviceInfo:
        return self.function.info()

    def region_info(self, index: int) -> RegionInfo:
        return self.function.region_info(index)

    def irq_info(self, index: int) -> IrqInfo:
        return self.function.interrupts.info(index)

    async def region_read(self, index: int, offset: int, count: int) -> bytes:
        return self.function.read(index, offset, count)

    async def region_write(self, index: int, offset: int, data: bytes | memoryview) -> None:
        self.function.write(index, offset, data)

    async def set_irqs(self, request: IrqRequest) -> None:
        self.function.interrupts.set_irqs(request)


assert ENTRY_SIZE * 2 * 64 <= PBA_OFFSET
