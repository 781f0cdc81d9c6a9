"""A device of one's own behind libvfio-user, with the bindings alone: no virtio, no event loop.

It counts writes to its doorbell, adds up guest memory, and interrupts.  Attach it to a machine as
``counter_device.py`` says; the library is found as LIBVFIO_USER says, or by the loader:

    .venv/bin/python examples/libvfio_user_device.py /tmp/sum.sock

BAR 0, registers of 64 bits: 0 ADDRESS and 8 LENGTH of guest memory; 16 SUM of its bytes after a
write to 24, the DOORBELL, which also triggers the one MSI vector.
"""

from __future__ import annotations

import contextlib
import errno
import struct
import sys

from vfio_user_virtio.libvfio_user import Context, Irq, LogLevel, Region, ResetKind, load

REGISTERS = struct.Struct("<QQQ")
DOORBELL = 24


class SumDevice:
    def __init__(self, context: Context) -> None:
        self.context = context
        self.registers = bytearray(32)
        context.pci_init()
        context.pci_set_id(0x1234, 0x50AD)
        context.pci_set_class(0xFF, 0)
        context.pci_add_capability(bytes.fromhex("05 00 80 00").ljust(24, b"\0"))  # MSI, 64 bits
        context.setup_region(Region.BAR0, 0x1000, read=self.read, write=self.write)
        context.setup_irqs(Irq.MSI, 1)
        context.setup_dma(unregister=lambda region: None)  # nothing is kept from call to call
        context.setup_reset(self.reset)
        context.setup_log(self.log, LogLevel.ERROR)
        context.realize()

    def log(self, level: LogLevel, text: str) -> None:
        print(level.name, text, file=sys.stderr)

    def read(self, offset: int, count: int) -> bytes:
        return bytes(self.registers[offset : offset + count]).ljust(count, b"\0")

    def write(self, offset: int, data: memoryview) -> None:
        if offset == DOORBELL:
            self.add_up()
        elif offset + len(data) <= len(self.registers):
            self.registers[offset : offset + len(data)] = data

    def add_up(self) -> None:
        address, length, _ = REGISTERS.unpack_from(self.registers)
        with self.context.scatter(address, length).map() as pieces:  # OSError: not the guest's
            total = sum(sum(piece) for piece in pieces)
        REGISTERS.pack_into(self.registers, 0, address, length, total)
        self.context.irq_trigger(0)

    def reset(self, kind: ResetKind) -> None:
        if kind is not ResetKind.LOST_CONNECTION:
            self.registers[:] = bytes(len(self.registers))


def main() -> None:
    with Context(load(), sys.argv[1], blocking=True) as context:
        SumDevice(context)
        print(f"serving at {sys.argv[1]}; end with Ctrl-C", flush=True)
        while True:
            context.attach()
            try:
                context.run()
            except OSError as error:
                if error.errno != errno.ENOTCONN:  # the client has gone; another may come
                    raise


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
