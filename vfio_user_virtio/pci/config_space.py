"""The configuration space of a type-0 PCI Express function: 4,096 bytes and what writes mean.

Three mechanisms, so that a capability can live in a file of its own and the state in one place:

* registers with masks (`RegisterBlock`) do all of reading, and nearly all of writing, BAR sizing
  included: the address bits below a BAR's size are simply not writable;
* a *watch* sees every write that touches its register, may correct the value, and names the events
  that the write gives rise to.  It is a pure function of the register; events go to whoever wrote;
* a *trap* hands a range of bytes to a handler, for VIRTIO_PCI_CAP_PCI_CFG's window.

The register values are the whole state.  An access may have any size and alignment and touch many
registers, watches and traps; it then acts as one write of all registers, followed by watches and
traps in ascending order of address, so that a window's address is in place before its data.

Sources: PCI Local Bus 3.0 chapter 6; PCI Express Base 4.0 chapter 7.  With stock QEMU the BAR
values, the MSI-X enable bits and the header type that a guest reads come from QEMU's own copy;
every write reaches us all the same, 0xffffffff for sizing and zeros at reset included
(vfio-user, VFIO_USER_REGION_WRITE; QEMU 11.1.3).

Rejected: decoding BAR addresses here (a vfio-user client addresses regions, never bus addresses)
and an I/O enable bit (there are no I/O BARs, so it is hardwired to 0 as PCI asks).
"""

from __future__ import annotations

import enum
import errno
from typing import TYPE_CHECKING, Final, Protocol, TypeAlias

import attrs

from vfio_user_virtio.errors import ClientError
from vfio_user_virtio.pci.registers import RegisterBlock

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

CONFIG_SIZE: Final = 4096
CAPABILITIES_START: Final = 0x40
EXTENDED_START: Final = 0x100

VENDOR_ID: Final = 0x00
DEVICE_ID: Final = 0x02
COMMAND: Final = 0x04
STATUS: Final = 0x06
REVISION_ID: Final = 0x08
CLASS_CODE: Final = 0x09
CACHE_LINE_SIZE: Final = 0x0C
BASE_ADDRESS: Final = 0x10
SUBSYSTEM_VENDOR_ID: Final = 0x2C
SUBSYSTEM_ID: Final = 0x2E
CAPABILITIES_POINTER: Final = 0x34
INTERRUPT_LINE: Final = 0x3C
INTERRUPT_PIN: Final = 0x3D

BAR_64BIT: Final = 1 << 2
BAR_PREFETCHABLE: Final = 1 << 3
MIN_BAR_SIZE: Final = 16


class Command(enum.IntFlag):
    """Bits of the COMMAND register that exist here."""

    MEMORY = 1 << 1
    MASTER = 1 << 2
    PARITY = 1 << 6
    SERR = 1 << 8
    INTX_DISABLE = 1 << 10


class Status(enum.IntFlag):
    """Bits of the STATUS register that are ever set here (there is no bus to err on)."""

    INTERRUPT = 1 << 3
    CAPABILITIES_LIST = 1 << 4


class ConfigEvents(enum.IntFlag):
    """What a write to configuration space gave rise to; the device acts on it."""

    NONE = 0
    COMMAND_CHANGED = 1 << 0
    """COMMAND has other bits now: memory, bus master, INTx disable."""
    FUNCTION_LEVEL_RESET = 1 << 1
    """Initiate Function Level Reset was written as 1: reset the device, `reset` included."""
    POWER_D3 = 1 << 2
    """The function has left D0 for D3hot."""
    POWER_D0 = 1 << 3
    """The function has come back from D3hot, which resets it (No_Soft_Reset is 0)."""
    MSIX_CHANGED = 1 << 4
    """MSI-X Enable or Function Mask has changed."""


Watch: TypeAlias = "Callable[[int, int, int], tuple[int, ConfigEvents]]"
"""(value before, value after, bits written as 1) -> (value to keep, events).

Called when a write touches the register.  Bytes of the register that were not written count as
written 0 in the third argument.
"""


class Trap(Protocol):
    """Who answers for a trapped range.  Offsets are from the start of the range."""

    def read(self, offset: int, count: int) -> bytes:
        """Exactly `count` bytes."""
        ...

    def write(self, offset: int, data: bytes) -> None: ...


@attrs.frozen
class Identity:
    """What the function says it is; `class_code` has 24 bits, base class highest."""

    vendor_id: int
    device_id: int
    class_code: int
    revision_id: int
    subsystem_vendor_id: int
    subsystem_id: int


@attrs.frozen
class MemoryBar:
    """A memory BAR of `size` bytes, a power of two; a 64-bit one takes two BAR registers."""

    size: int
    is_64bit: bool = False
    prefetchable: bool = False


class ConfigSpace:
    """The configuration space of one function.

    Construct it, add capabilities in the order in which a driver should meet them, then `read`,
    `write` and `reset`.  Building raises ValueError for what cannot be; those are mistakes in the
    program.  `interrupt_pin` is 1…4 for INTA…INTD, 0 for a function without INTx.
    """

    def __init__(
        self, identity: Identity, bars: Mapping[int, MemoryBar], *, interrupt_pin: int = 1
    ) -> None:
        self.registers: Final = RegisterBlock(CONFIG_SIZE)
        self._watches: list[tuple[int, int, Watch]] = []
        self._traps: list[tuple[int, int, Trap]] = []
        self._last_pointer = CAPABILITIES_POINTER
        self._next_capability = CAPABILITIES_START
        self._last_extended = 0
        self._next_extended = EXTENDED_START
        declare = self.registers.declare
        declare(VENDOR_ID, 2, identity.vendor_id)
        declare(DEVICE_ID, 2, identity.device_id)
        declare(COMMAND, 2, writable=sum(Command))
        declare(STATUS, 2, volatile=Status.INTERRUPT)
        declare(REVISION_ID, 1, identity.revision_id)
        declare(CLASS_CODE, 3, identity.class_code)
        declare(CACHE_LINE_SIZE, 1, writable=0xFF)
        declare(SUBSYSTEM_VENDOR_ID, 2, identity.subsystem_vendor_id)
        declare(SUBSYSTEM_ID, 2, identity.subsystem_id)
        declare(CAPABILITIES_POINTER, 1)
        declare(INTERRUPT_LINE, 1, writable=0xFF)
        declare(INTERRUPT_PIN, 1, interrupt_pin)
        for index, bar in bars.items():
            self._declare_bar(index, bar)
        self.watch(COMMAND, 2, _command_written)

    def _declare_bar(self, index: int, bar: MemoryBar) -> None:
        registers = 2 if bar.is_64bit else 1
        if not 0 <= index <= 6 - registers:
            raise ValueError(f"BAR{index} does not exist, or has no second half")
        if bar.size < MIN_BAR_SIZE or bar.size & (bar.size - 1) or bar.size >> 32 * registers:
            raise ValueError(f"BAR{index} cannot have {bar.size} bytes")
        flags = bar.is_64bit * BAR_64BIT | bar.prefetchable * BAR_PREFETCHABLE
        address_bits = (1 << 32 * registers) - bar.size
        size = 4 * registers
        self.registers.declare(BASE_ADDRESS + 4 * index, size, flags, writable=address_bits)

    def add_capability(
        self,
        capability_id: int,
        body: bytes,
        write_mask: bytes | None = None,
        clear_mask: bytes | None = None,
    ) -> int:
        """Append a capability to the chain and return its offset, a multiple of 4.

        `body` is what follows the two bytes of ID and next pointer; the masks, of the same length,
        tell its read-write and write-1-to-clear bits.
        """
        header = bytes([capability_id, 0])
        offset = self._next_capability
        end = self._declare_capability(offset, EXTENDED_START, header, body, write_mask, clear_mask)
        self._next_capability = end
        self.registers.set_default(self._last_pointer, 1, offset)
        self._last_pointer = offset + 1
        status = self.registers.load(STATUS, 2) | Status.CAPABILITIES_LIST
        self.registers.set_default(STATUS, 2, status)
        return offset

    def add_extended_capability(
        self,
        capability_id: int,
        version: int,
        body: bytes,
        write_mask: bytes | None = None,
        clear_mask: bytes | None = None,
    ) -> int:
        """Append an extended capability and return its offset; `body` follows its 4-byte header."""
        header = (capability_id | version << 16).to_bytes(4, "little")
        offset = self._next_extended
        end = self._declare_capability(offset, CONFIG_SIZE, header, body, write_mask, clear_mask)
        self._next_extended = end
        if self._last_extended:
            link = self.registers.load(self._last_extended, 4) | offset << 20
            self.registers.set_default(self._last_extended, 4, link)
        self._last_extended = offset
        return offset

    def _declare_capability(
        self,
        offset: int,
        limit: int,
        header: bytes,
        body: bytes,
        write_mask: bytes | None,
        clear_mask: bytes | None,
    ) -> int:
        size = len(header) + len(body)
        if offset + size > limit:
            raise ValueError(f"no room for a capability of {size} bytes at {offset:#x}")
        if any(mask is not None and len(mask) != len(body) for mask in (write_mask, clear_mask)):
            raise ValueError("a capability's masks must have the length of its body")
        zeros = bytes(len(header))
        self.registers.declare(
            offset,
            size,
            int.from_bytes(header + body, "little"),
            writable=int.from_bytes(zeros + (write_mask or b""), "little"),
            write_1_to_clear=int.from_bytes(zeros + (clear_mask or b""), "little"),
        )
        return (offset + size + 3) & ~3

    def watch(self, offset: int, size: int, watch: Watch) -> None:
        """Have `watch` called for every write that touches the register at `offset`."""
        self._watches.append((offset, size, watch))
        self._watches.sort(key=lambda entry: entry[0])

    def trap(self, offset: int, size: int, handler: Trap) -> None:
        """Have `handler` read and write the `size` bytes at `offset` instead of the registers.

        Trapped bytes are no state of this object.
        """
        self._traps.append((offset, size, handler))
        self._traps.sort(key=lambda entry: entry[0])

    def read(self, offset: int, count: int) -> bytes:
        """`count` bytes at `offset`.

        Raises ClientError (EINVAL) outside the space, and what a trap's handler raises.
        """
        data = self.registers.read(offset, count)
        end = offset + count
        for start, size, handler in self._traps:
            first, last = max(offset, start), min(end, start + size)
            if first < last:
                answer = handler.read(first - start, last - first)
                data = data[: first - offset] + answer + data[last - offset :]
        return data

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> ConfigEvents:
        """Write `data` at `offset` and tell what the device must do about it.

        Raises ClientError (EINVAL) outside the space, and what a trap's handler raises.
        """
        end = offset + len(data)
        watched = [
            (start, size, watch, self.registers.load(start, size))
            for start, size, watch in self._watches
            if offset < start + size and start < end
        ]
        self.registers.write(offset, data)
        events = ConfigEvents.NONE
        for start, size, watch, before in watched:
            first, last = max(offset, start), min(end, start + size)
            ones = int.from_bytes(data[first - offset : last - offset], "little")
            after = self.registers.load(start, size)
            kept, arisen = watch(before, after, ones << 8 * (first - start))
            self.registers.store(start, size, kept)
            events |= arisen
        for start, size, handler in self._traps:
            first, last = max(offset, start), min(end, start + size)
            if first < last:
                handler.write(first - start, bytes(data[first - offset : last - offset]))
        return events

    @property
    def command(self) -> int:
        """The COMMAND register (`Command` bits)."""
        return self.registers.load(COMMAND, 2)

    def set_interrupt_status(self, asserted: bool) -> None:
        """Show in STATUS whether the function asserts INTx (whatever INTx Disable says)."""
        status = self.registers.load(STATUS, 2) & ~Status.INTERRUPT
        self.registers.store(STATUS, 2, status | asserted * Status.INTERRUPT)

    def reset(self) -> None:
        """Every register back to its default: conventional reset, FLR, and D3hot to D0 alike.

        PCI Express lets an FLR keep a few fields that concern the link (Max_Payload_Size, ASPM
        control, …).  There is no link here, so nothing is kept.
        """
        self.registers.reset()

    def state(self) -> bytes:
        """All register values; what `restore_untrusted` takes."""
        return self.registers.state()

    def restore_untrusted(self, state: bytes) -> None:
        """Take the state of a function built like this one; no events, the device looks itself.

        Raises ClientError (EINVAL), having changed nothing, when the state is not one that such a
        function can have.
        """
        before = self.registers.state()
        self.registers.restore_untrusted(state)
        for start, size, watch in self._watches:
            value = self.registers.load(start, size)
            default = int.from_bytes(before[start : start + size], "little")
            if watch(default, value, 0)[0] != value:
                self.registers.restore_untrusted(before)
                raise ClientError(
                    errno.EINVAL,
                    f"configuration state has {value:#x} in the register at {start:#x}, a value"
                    " that it cannot hold",
                )


def _command_written(before: int, after: int, ones: int) -> tuple[int, ConfigEvents]:
    return after, ConfigEvents.NONE if before == after else ConfigEvents.COMMAND_CHANGED
