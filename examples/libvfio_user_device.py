"""A device of one's own behind libvfio-user, with the bindings alone: no virtio, no event loop.

It adds up guest memory, and interrupts.  Attach it to a machine as ``counter_device.py`` says; the
library is found as LIBVFIO_USER says, or by the loader:

    .venv/bin/python examples/libvfio_user_device.py /tmp/sum.sock

BAR 0, registers of 64 bits: 0 ADDRESS and 8 LENGTH of guest memory; 16 SUM of its bytes after a
write to 24, the DOORBELL, which also triggers the one MSI vector.
"""

from __future__ import annotations

import contextlib
import errno
import struct
import sys

from vfio_user_virtio.libvfio_user import Context, Irq, Region, ResetKind, load

REGISTERS = struct.Struct("<QQQ")
DOORBELL = 24


def describe(context: Context) -> None:
    registers = bytearray(0x1000)

    def read(offset: int, count: int) -> bytearray:
        return registers[offset : offset + count]

    def write(offset: int, data: memoryview) -> None:
        registers[offset : offset + len(data)] = data
        if offset == DOORBELL:
            address, length, _ = REGISTERS.unpack_from(registers)
            with context.scatter(address, length).map() as pieces:  # OSError: not the guest's
                total = sum(sum(piece) for piece in pieces)
            REGISTERS.pack_into(registers, 0, address, length, total)
            context.irq_trigger(0)

    def reset(_: ResetKind) -> None:
        registers[:] = bytes(len(registers))

    context.pci_init()
    context.pci_set_id(0x1234, 0x50AD)
    context.pci_set_class(0xFF, 0)
    context.pci_add_capability(bytes.fromhex("05 00 80 00").ljust(24, b"\0"))  # MSI, 64 bits
    context.setup_region(Region.BAR0, len(registers), read=read, write=write)
    context.setup_irqs(Irq.MSI, 1)
    context.setup_dma(unregister=lambda _: None)  # no memory is kept from call to call
    context.setup_reset(reset)
    context.realize()


with Context(load(), sys.argv[1], blocking=True) as device, contextlib.suppress(KeyboardInterrupt):
    describe(device)
    print(f"serving at {sys.argv[1]}; end with Ctrl-C", flush=True)
    while True:
        device.attach()
        try:
            device.run()
        except OSError as error:
            if error.errno != errno.ENOTCONN:  # that one has gone; another may come
                raise
