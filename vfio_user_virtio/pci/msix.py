"""MSI-X (capability ID 0x11): the capability, the vector table and the pending bit array.

Who delivers, and when?  On hardware, a vector's message goes out unless MSI-X is off, the function
is masked or the vector is; a masked one sets its pending bit, which goes out on unmask.  Under
VFIO all of that masking is the client's: MSI-X's IRQ info has no MASKABLE flag, and a client that
wants a vector quiet takes its eventfd away (SET_IRQS) or just does not look at it.  Stock QEMU
emulates the table and shows the guest its own copy: it forwards no table write, so the mask bits
in *our* table stay at their reset value 1 for ever while the guest's are 0.  QEMU also keeps the
eventfd of a vector that the guest masked, and notes by itself that it fired; what reaches us are
reads of the pending bits.  The control register *is* forwarded, before the SET_IRQS that follow.

Hence the rules:

* delivery depends on one thing, whether the vector has an eventfd, and never on mask bits; asking
  our table would silence every guest under QEMU;
* a vector without an eventfd is what a masked vector is on hardware (it is what the kernel's VFIO
  does to the hardware then), so firing sets its pending bit, and giving it an eventfd delivers;
* a reset forgets what was pending.  Switching the index off does not: some clients do so only to
  switch it on again with more vectors, and where a spurious interrupt costs a look at the ring, a
  lost one stalls it;
* the table is storage, for a client that does forward writes and for migration; the pending bits
  are read-only to the client, as PCI has it.

The eventfds and this decision are in `vfio_user_virtio.backends.software.interrupts`; here is what
a client can read and write.

Layout (PCI Express Base 4.0, 7.7.2), little-endian.  Capability, after ID and next pointer:
Message Control 16 (bits 0-10 table size - 1, 14 Function Mask, 15 Enable), Table 32 (bits 0-2 BAR,
the rest offset), PBA 32 alike.  Table entry, 16 bytes: Message Address 64, Message Data 32, Vector
Control 32 (bit 0 Mask, 1 after reset).  Pending bits: one per vector, in 64-bit words.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

from vfio_user_virtio.pci.config_space import ConfigEvents
from vfio_user_virtio.pci.registers import RegisterBlock

if TYPE_CHECKING:
    from vfio_user_virtio.pci.config_space import ConfigSpace

CAPABILITY_ID: Final = 0x11
_BODY: Final = struct.Struct("<HII")
assert _BODY.size == 10
_ENTRY: Final = struct.Struct("<QII")
assert _ENTRY.size == 16

MESSAGE_CONTROL: Final = 0x02
"""Offset of Message Control in the capability."""
ENABLE: Final = 1 << 15
FUNCTION_MASK: Final = 1 << 14
MAX_VECTORS: Final = 2048
ENTRY_SIZE: Final = _ENTRY.size
_VECTOR_MASKED: Final = 1
_ADDRESS_BITS: Final = (1 << 64) - 4


class MsixCapability:
    """The capability of `vectors` vectors in `config`; writes yield `ConfigEvents.MSIX_CHANGED`.

    Raises ValueError unless there are 1…2,048 vectors and the offsets are multiples of 8.
    """

    def __init__(
        self,
        config: ConfigSpace,
        vectors: int,
        *,
        table_bar: int,
        table_offset: int,
        pba_bar: int,
        pba_offset: int,
    ) -> None:
        _check_vectors(vectors)
        if (table_offset | pba_offset) & 7:
            raise ValueError("the MSI-X table and pending bits must be aligned to 8 bytes")
        self._registers = config.registers
        self.offset = config.add_capability(
            CAPABILITY_ID,
            _BODY.pack(vectors - 1, table_offset | table_bar, pba_offset | pba_bar),
            _BODY.pack(ENABLE | FUNCTION_MASK, 0, 0),
        )
        config.watch(self.offset + MESSAGE_CONTROL, 2, _message_control_written)

    @property
    def enabled(self) -> bool:
        """Whether MSI-X is on, so that the function must not use INTx."""
        return bool(self._registers.load(self.offset + MESSAGE_CONTROL, 2) & ENABLE)

    @property
    def function_masked(self) -> bool:
        """Whether all vectors are masked at once; for show, see the module head."""
        return bool(self._registers.load(self.offset + MESSAGE_CONTROL, 2) & FUNCTION_MASK)


def msix_table(vectors: int) -> RegisterBlock:
    """A vector table of 16 bytes per vector, every vector masked; read, write, reset it."""
    _check_vectors(vectors)
    table = RegisterBlock(ENTRY_SIZE * vectors)
    value = int.from_bytes(_ENTRY.pack(0, 0, _VECTOR_MASKED), "little")
    writable = int.from_bytes(_ENTRY.pack(_ADDRESS_BITS, 0xFFFF_FFFF, _VECTOR_MASKED), "little")
    for offset in range(0, table.size, ENTRY_SIZE):
        table.declare(offset, ENTRY_SIZE, value, writable=writable)
    return table


class PendingBits:
    """The pending bit array: which of `vectors` vectors fired while nobody could be told."""

    __slots__ = ("_pending", "size")

    def __init__(self, vectors: int) -> None:
        _check_vectors(vectors)
        self.size = (vectors + 63) // 64 * 8
        """In bytes."""
        self._pending = RegisterBlock(self.size)
        self._pending.declare(0, self.size, volatile=(1 << vectors) - 1)

    def read(self, offset: int, count: int) -> bytes:
        """`count` bytes at `offset`.  Raises ClientError (EINVAL) outside the array."""
        return self._pending.read(offset, count)

    def add(self, vector: int) -> None:
        """The vector fired and could not be delivered."""
        byte = vector >> 3
        self._pending.store(byte, 1, self._pending.load(byte, 1) | 1 << (vector & 7))

    def take(self, vector: int) -> bool:
        """Whether the vector was pending; it no longer is."""
        byte, bit = vector >> 3, 1 << (vector & 7)
        value = self._pending.load(byte, 1)
        self._pending.store(byte, 1, value & ~bit)
        return bool(value & bit)

    def clear(self) -> None:
        """Nothing is pending."""
        self._pending.reset()

    def state(self) -> bytes:
        """The array as bytes; what `restore_untrusted` takes."""
        return self._pending.state()

    def restore_untrusted(self, state: bytes) -> None:
        """Take another's bits.  Raises ClientError (EINVAL) for bits of vectors not there."""
        self._pending.restore_untrusted(state)


def _check_vectors(vectors: int) -> None:
    if not 1 <= vectors <= MAX_VECTORS:
        raise ValueError(f"{vectors} MSI-X vectors: there must be 1 to {MAX_VECTORS}")


def _message_control_written(before: int, after: int, ones: int) -> tuple[int, ConfigEvents]:
    return after, ConfigEvents.NONE if before == after else ConfigEvents.MSIX_CHANGED
