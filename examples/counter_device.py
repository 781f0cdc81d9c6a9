"""A PCI device of one's own, served to QEMU with the library: no virtio, no switch.

It counts.  One BAR, one MSI-X vector, and what a PCI Express function must have.  Run it and attach
it to a machine:

    .venv/bin/python examples/counter_device.py /tmp/counter.sock
    qemu-system-x86_64 -machine q35,memory-backend=ram \\
        -object memory-backend-memfd,id=ram,size=1G,share=on \\
        -device '{"driver":"vfio-user-pci","socket":{"type":"unix","path":"/tmp/counter.sock"}}'

BAR 0 has 4 KiB: registers of 32 bits, little-endian, to be read and written whole; others read 0.

    0x00  SCRATCH   keeps what is written
    0x04  COUNTER   how often DOORBELL was written
    0x08  ALARM     the vector fires when COUNTER gets to this value; 0: never
    0x0c  DOORBELL  write anything to count
    0x800 MSI-X table, 0xc00 pending bits

`CounterDevice` is a `vfio_user_virtio.device.Device`, which is the whole contract: what a session
calls, when, and what it may raise.  This one does no DMA and offers no migration.
"""

from __future__ import annotations

import os
import socket
import struct
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

import trio

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
    ConfigEvents,
    ConfigSpace,
    Identity,
    MemoryBar,
)
from vfio_user_virtio.pci.msix import MsixCapability, msix_table
from vfio_user_virtio.pci.pcie_capability import add_pcie_capability
from vfio_user_virtio.transport.listener import serve_listener

if TYPE_CHECKING:
    from vfio_user_virtio.device import (
        DmaMapping,
        IrqInfo,
        IrqRequest,
        RemoteMemory,
        ResetCause,
    )

IDENTITY: Final = Identity(
    vendor_id=0x1234,  # nobody's; QEMU's own educational device uses it too
    device_id=0xC047,
    class_code=0xFF0000,
    revision_id=1,
    subsystem_vendor_id=0x1234,
    subsystem_id=1,
)
BAR_SIZE: Final = 0x1000
SCRATCH: Final = 0x00
COUNTER: Final = 0x04
ALARM: Final = 0x08
DOORBELL: Final = 0x0C
TABLE: Final = 0x800
PENDING: Final = 0xC00
REGISTER: Final = struct.Struct("<I")
READ_WRITE: Final = RegionFlags.READ | RegionFlags.WRITE


class CounterDevice(WithoutMigration):
    """See the module head.  Its registers outlive sessions, as those of hardware do."""

    def __init__(self) -> None:
        self.registers = {SCRATCH: 0, COUNTER: 0, ALARM: 0}
        self.interrupts = Interrupts(vectors=1)
        self.config = ConfigSpace(IDENTITY, {0: MemoryBar(BAR_SIZE)}, interrupt_pin=0)
        self.table = msix_table(1)
        MsixCapability(
            self.config, 1, table_bar=0, table_offset=TABLE, pba_bar=0, pba_offset=PENDING
        )
        add_pcie_capability(self.config)

    def device_info(self) -> DeviceInfo:
        return DeviceInfo(DeviceFlags.RESET | DeviceFlags.PCI, num_regions=9, num_irqs=5)

    def region_info(self, index: int) -> RegionInfo:
        sizes = {VfioRegion.BAR0: BAR_SIZE, VfioRegion.CONFIG: CONFIG_SIZE}
        size = sizes.get(VfioRegion(index), 0)
        return RegionInfo(size, READ_WRITE if size else RegionFlags(0))

    def irq_info(self, index: int) -> IrqInfo:
        return self.interrupts.info(index)

    async def set_irqs(self, request: IrqRequest) -> None:
        self.interrupts.set_irqs(request)

    async def region_read(self, index: int, offset: int, count: int) -> bytes:
        if index == VfioRegion.CONFIG:
            return self.config.read(offset, count)
        if 0 <= offset - TABLE <= self.table.size - count:
            return self.table.read(offset - TABLE, count)
        if 0 <= offset - PENDING <= self.interrupts.pending.size - count:
            return self.interrupts.pending.read(offset - PENDING, count)
        if count == REGISTER.size and offset in self.registers:
            return REGISTER.pack(self.registers[offset])
        return bytes(count)

    async def region_write(self, index: int, offset: int, data: bytes | memoryview) -> None:
        if index == VfioRegion.CONFIG:
            if self.config.write(offset, data) & ConfigEvents.FUNCTION_LEVEL_RESET:
                self._reset()
        elif 0 <= offset - TABLE <= self.table.size - len(data):
            self.table.write(offset - TABLE, data)
        elif len(data) == REGISTER.size and offset == DOORBELL:
            self._count()
        elif len(data) == REGISTER.size and offset in self.registers and offset != COUNTER:
            (self.registers[offset],) = REGISTER.unpack(data)

    def _count(self) -> None:
        self.registers[COUNTER] = (self.registers[COUNTER] + 1) & 0xFFFF_FFFF
        if self.registers[COUNTER] == self.registers[ALARM]:
            self.interrupts.trigger(0)

    async def reset(self, cause: ResetCause) -> None:
        self._reset()

    def _reset(self) -> None:
        self.registers = dict.fromkeys(self.registers, 0)
        self.config.reset()
        self.table.reset()
        self.interrupts.reset()

    async def dma_map(self, mapping: DmaMapping) -> None:
        """Guest memory is offered to every device; one without DMA gives it back."""
        if mapping.fd is not None:
            os.close(mapping.fd)

    async def dma_unmap(self, iova: int, size: int) -> None:
        pass

    def work(self) -> None:
        """After each batch of commands; there is nothing that was put off."""

    async def serve(self, memory: RemoteMemory) -> None:
        """The device's own task in a session: this one does only what it is told."""
        await trio.sleep_forever()

    async def release(self) -> None:
        """The session is over: the eventfds were the client's."""
        self.interrupts.close()


def main() -> int:
    if len(sys.argv) != 2:
        print(f"usage: {sys.argv[0]} SOCKET-PATH", file=sys.stderr)
        return os.EX_USAGE
    path = Path(sys.argv[1])
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen()
        print(f"serving a counter at {path}; end with Ctrl-C", flush=True)
        try:
            trio.run(serve_listener, listener, CounterDevice())
        except* KeyboardInterrupt:
            pass
        finally:
            path.unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main())
