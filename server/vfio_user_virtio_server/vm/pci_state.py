"""The PCI state of a function that its driver has made, taken from one VM and put into another.

QEMU saves nothing for a vfio-user device, so the function arrives as at power on: no addresses, no
MSI-X, no bus mastering.  All of that can be read and written through QEMU by anybody who reaches
its configuration space and guest-physical memory (`PciAccess`, by `qtest`), and must be: only if
the writes come by QEMU's own code does it map the BARs, allocate interrupt routes, and send the
server SET_IRQS with its eventfds.

`PciState` is plain data.  Which registers it has is told by two tables, one for the header and one
for capabilities; registers that have more than state in them have a mask.  The MSI-X table is read
and written entry by entry in memory.  The order of `restore` matters:

1. BARs and simple registers, then COMMAND with memory decoding on, to reach the table;
2. the MSI-X table while MSI-X is off: QEMU then sets up all vectors at once when it is turned on,
   instead of one SET_IRQS for each entry that is unmasked;
3. capabilities, MSI-X control last of them; then COMMAND as it was.

What cannot be taken is said by `refusals` while the guest runs: a function in a power state other
than D0 (its BARs cannot be reached), MSI (nothing of ours has it; no pending bits can be kept).

INTx: QEMU counts asserted lines per bus, and that count is migrated with the bus while the function
that asserts it is not: the line would stay up for ever.  `Command.INTX_DISABLE` at the stopped
source takes the level out of the count (`without_intx`); once the target has COMMAND as it was, the
interrupt that is replayed asserts it anew.

The guest waits meanwhile, and an access can be a message to the server, so there are few of them:
what no driver changes is read while the guest runs (`read_config`, `compare`), only state is read
of a guest that is stopped (`capture`), and registers that have their value already are not written.
Accesses that need not wait for each other's results are handed over all at once.

Pending bits are not carried: each vector fires once at the target, which is what they are for.
The extended configuration space is not carried either; our functions have nothing there.

Source: PCI Local Bus 3.0, 6; PCI Express Base 4.0, 7.5 and 7.7; QEMU 11.1.3, hw/vfio/pci.c.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Protocol

import attrs

from vfio_user_virtio.pci.config_space import (
    BAR_64BIT,
    BASE_ADDRESS,
    CAPABILITIES_POINTER,
    COMMAND,
    INTERRUPT_LINE,
    STATUS,
    Command,
    Status,
)
from vfio_user_virtio_server.vm.errors import QemuError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

STANDARD_SIZE: Final = 256
"""Bytes of the configuration space that the I/O ports reach."""

_BARS: Final = BASE_ADDRESS
_HEADER_SIZE: Final = 0x40
_BAR_IO: Final = 1 << 0
_BAR_FLAGS: Final = 0xF

_POWER: Final = 0x01
_MSI: Final = 0x05
_VENDOR: Final = 0x09
_EXPRESS: Final = 0x10
_MSIX: Final = 0x11

_POWER_CONTROL: Final = 4
_POWER_STATE: Final = 3
_MSI_CONTROL: Final = 2
_MSI_ENABLE: Final = 1
_MSIX_CONTROL: Final = 2
_MSIX_ENABLE: Final = 1 << 15
_MSIX_LAST_VECTOR: Final = 0x7FF
_MSIX_TABLE: Final = 4
_MSIX_BAR: Final = 7
_ENTRY_WORDS: Final = 4
_VIRTIO_PCI_ACCESS: Final = 5
"""cfg_type of the capability whose last register is an access to a BAR: it must not be read."""
_VIRTIO_SIZE: Final = 16

_SIZES: Final = {_POWER: 8, _MSI: 4, _EXPRESS: 0x3C, _MSIX: 12}
"""Bytes of the capabilities that matter here; a vendor's tells its own size."""


@attrs.frozen
class Register:
    """`size` bytes at `offset`; the bits of `mask` are state, the others the function's affair."""

    offset: int
    size: int
    mask: int = 0xFFFF_FFFF


_BAR_REGISTERS: Final = tuple(Register(_BARS + 4 * bar, 4) for bar in range(6))

HEADER: Final = (
    Register(0x0C, 1),  # Cache Line Size
    Register(0x0D, 1),  # Latency Timer
    *_BAR_REGISTERS,
    Register(0x30, 4),  # Expansion ROM Base Address
    Register(INTERRUPT_LINE, 1),
)
"""All but COMMAND, which `restore` has a mind of its own about."""

CAPABILITIES: Final[Mapping[int, tuple[Register, ...]]] = {
    _EXPRESS: (
        Register(0x08, 2, 0x7FFF),  # Device Control, without Initiate Function Level Reset
        Register(0x10, 2, 0xFFDF),  # Link Control, without Retrain Link
        Register(0x28, 2),  # Device Control 2
        Register(0x30, 2, 0xFFDF),  # Link Control 2
    ),
    _VENDOR: (Register(0x04, 1), Register(0x08, 4), Register(0x0C, 4)),
    _POWER: (Register(_POWER_CONTROL, 2, 0x0103),),  # PowerState, PME_En; not PME_Status
    _MSIX: (Register(_MSIX_CONTROL, 2, 0xC000),),  # Enable, Function Mask
}
"""By capability ID, in the order in which they are restored.  Of a vendor's, only virtio's access
to configuration is writable."""

_STATUS_REGISTERS: Final[Mapping[int, tuple[Register, ...]]] = {
    _EXPRESS: tuple(Register(offset, 2) for offset in (0x0A, 0x12, 0x2A, 0x32)),
    _POWER: (Register(_POWER_CONTROL, 2),),
}
"""Which are nobody's choice: they say how the device and its link are now."""


@attrs.frozen
class Access:
    """The 32-bit word at `address` is read, or `value`, of `size` bytes, written there.

    Numbers are little-endian.  `address` is an offset in configuration space, or guest-physical; a
    multiple of 4 where it is read, and of `size` (1, 2 or 4; 4 in memory) where it is written.
    """

    address: int
    value: int | None = None
    size: int = 4
    memory: bool = False


class PciAccess(Protocol):
    """A function's configuration space and guest-physical memory, as their VM has them."""

    async def run(self, accesses: Sequence[Access]) -> list[int]:
        """Do them one after the other: the words that were read.  Raises QemuError."""
        ...


@attrs.frozen
class PciState:
    """A function as its driver has set it up.

    `config`: the standard configuration space, zeros where it was not read.  `table`: the words of
    the MSI-X table, four for each vector; empty if the function has none.
    """

    config: bytes
    table: tuple[int, ...] = ()

    def load(self, offset: int, size: int) -> int:
        return int.from_bytes(self.config[offset : offset + size], "little")

    @property
    def command(self) -> int:
        return self.load(COMMAND, 2)

    @property
    def uses_intx(self) -> bool:
        """Whether its interrupts are INTx, which is where MSI-X is off."""
        controls = (offset + _MSIX_CONTROL for offset in self.capabilities.get(_MSIX, ()))
        return not any(self.load(control, 2) & _MSIX_ENABLE for control in controls)

    @property
    def capabilities(self) -> dict[int, list[int]]:
        """Offsets by capability ID, in the order of the chain."""
        found: dict[int, list[int]] = {}
        for offset in _chain(self.config):
            found.setdefault(self.config[offset], []).append(offset)
        return found

    def words(self) -> list[int]:
        """Offsets of all that may be read without an effect."""
        chain = list(_chain(self.config))
        behind = [word for offset in chain for word in _words(self.config, offset)]
        return [*range(0, _HEADER_SIZE, 4), *chain, *behind]

    def state_words(self) -> list[int]:
        """Offsets of what drivers change, of what `refusals` looks at, and of the function's ID,
        which shows whether it still answers."""
        offsets = [0, COMMAND, *(register.offset for register in self.registers())]
        offsets += [offset + _MSI_CONTROL for offset in self.capabilities.get(_MSI, ())]
        return sorted({offset & ~3 for offset in offsets})

    def registers(self) -> Iterator[Register]:
        """What `restore` writes beside COMMAND and the table, in its order."""
        yield from HEADER
        capabilities = self.capabilities
        for ident, registers in CAPABILITIES.items():
            for offset in capabilities.get(ident, ()):
                if ident == _VENDOR and self.config[offset + 3] != _VIRTIO_PCI_ACCESS:
                    continue
                for register in registers:
                    yield attrs.evolve(register, offset=offset + register.offset)

    def refusals(self) -> list[str]:
        """Why this function cannot be taken to another VM now."""
        capabilities = self.capabilities
        problems = []
        for offset in capabilities.get(_POWER, ()):
            power = self.load(offset + _POWER_CONTROL, 2) & _POWER_STATE
            if power:
                problems.append(f"the guest has put it to sleep (D{power}): wake it up first")
        for offset in capabilities.get(_MSI, ()):
            on = self.load(offset + _MSI_CONTROL, 2) & _MSI_ENABLE
            problems += ["its driver uses MSI, which is not carried; MSI-X and INTx are"] * on
        return problems

    def differences(self, other: PciState) -> list[str]:
        """How the functions themselves differ, whatever their drivers have set."""
        return [
            f"byte {offset:#x} of configuration space is {mine:#04x} here and {theirs:#04x} there"
            for offset, (mine, theirs) in enumerate(zip(self._shape(), other._shape(), strict=True))
            if mine != theirs
        ]

    def _shape(self) -> bytes:
        """What no driver changes."""
        shape = bytearray(self.config)
        for register in (*self.registers(), *self._volatile()):
            place = slice(register.offset, register.offset + register.size)
            kept = self.load(register.offset, register.size) & ~register.mask
            shape[place] = kept.to_bytes(register.size, "little")
        for bar, register in enumerate(_BAR_REGISTERS):
            if not self._is_upper_half(bar):
                shape[register.offset] = self.config[register.offset] & _BAR_FLAGS
        return bytes(shape)

    def _volatile(self) -> Iterator[Register]:
        yield from (Register(COMMAND, 2), Register(STATUS, 2))
        for ident, registers in _STATUS_REGISTERS.items():
            for offset in self.capabilities.get(ident, ()):
                for register in registers:
                    yield attrs.evolve(register, offset=offset + register.offset)

    def _is_upper_half(self, bar: int) -> bool:
        below = [self.load(register.offset, 4) for register in _BAR_REGISTERS[:bar]]
        upper = False
        for value in below:
            upper = not upper and value & (BAR_64BIT | _BAR_IO) == BAR_64BIT
        return upper

    def table_words(self) -> range:
        """Where the words of the MSI-X table are in guest-physical memory; empty without any.

        Raises QemuError if its BAR has no address, and MSI-X is on nevertheless.
        """
        for offset in self.capabilities.get(_MSIX, ()):
            control = self.load(offset + _MSIX_CONTROL, 2)
            vectors = (control & _MSIX_LAST_VECTOR) + 1
            where = self.load(offset + _MSIX_TABLE, 4)
            bar = where & _MSIX_BAR
            base = self.load(_BARS + 4 * bar, 4)
            address = base & ~_BAR_FLAGS
            if base & BAR_64BIT:
                address |= self.load(_BARS + 4 * bar + 4, 4) << 32
            if address:
                start = address + (where & ~_MSIX_BAR)
                return range(start, start + 4 * _ENTRY_WORDS * vectors, 4)
            if control & _MSIX_ENABLE:
                raise QemuError(f"MSI-X is on, and BAR{bar} with its table has no address")
        return range(0)


async def read_config(access: PciAccess) -> PciState:
    """Configuration space alone; changes nothing, so the guest may run.  Raises QemuError."""
    config = bytearray(STANDARD_SIZE)
    await _read(access, config, range(0, _HEADER_SIZE, 4))
    read: set[int] = set()
    while new := [offset for offset in _chain(config) if offset not in read]:
        read.update(new)
        await _read(access, config, new)
        await _read(access, config, [word for offset in new for word in _words(config, offset)])
    return PciState(bytes(config))


async def compare(access: PciAccess, like: PciState) -> PciState:
    """The function at `access`, if it is of the kind that `like` is.  Raises QemuError."""
    config = bytearray(like.config)
    await _read(access, config, like.words())
    found = PciState(bytes(config))
    if problems := like.differences(found):
        raise QemuError(f"the functions differ: {problems[0]}")
    return found


async def capture(access: PciAccess, like: PciState) -> PciState:
    """All of the function, of which `like` was read earlier.

    The guest must not run: memory decoding may have to be turned on for a while.  Raises QemuError,
    also for a function that cannot be taken (`PciState.refusals`).
    """
    config = bytearray(like.config)
    await _read(access, config, like.state_words())
    state = PciState(bytes(config))
    if changes := like.differences(state):
        raise QemuError(f"the function does not answer as it did: {changes[0]}")
    if problems := state.refusals():
        raise QemuError("; ".join(problems))
    entries = list(map(_in_memory, state.table_words()))
    if entries and not state.command & Command.MEMORY:
        decoding = Access(COMMAND, state.command | Command.MEMORY, 2)
        entries = [decoding, *entries, Access(COMMAND, state.command, 2)]
    return attrs.evolve(state, table=tuple(await access.run(entries)))


async def without_intx(access: PciAccess, state: PciState) -> None:
    """Take INTx, if it is in use, out of the bus's count; `with_command` undoes it.

    Raises QemuError.
    """
    if state.uses_intx:
        await access.run([Access(COMMAND, state.command | Command.INTX_DISABLE, 2)])


async def with_command(access: PciAccess, state: PciState) -> None:
    """COMMAND as it is in `state`.  Raises QemuError."""
    await access.run([Access(COMMAND, state.command, 2)])


async def with_intx(access: PciAccess, state: PciState) -> None:
    """INTx as it has to be where it is in use.  Raises QemuError."""
    if state.uses_intx:
        await access.run([Access(COMMAND, state.command & ~Command.INTX_DISABLE, 2)])


async def restore(access: PciAccess, state: PciState, fresh: PciState) -> None:
    """Make the function at `access`, which is `fresh` (see `compare`), be as `state` has it.

    Raises QemuError when it does not keep what it is given.
    """
    changed = [register for register in state.registers() if _differs(register, state, fresh)]
    writes = [_write(register, state, fresh) for register in changed]
    table = state.table_words() if state.table else range(0)
    reached = state.command | (Command.MEMORY if table else 0)
    written = [*changed, Register(COMMAND, 2)]
    words = sorted({register.offset & ~3 for register in written})
    found = await access.run(
        [
            *(write for write in writes if write.address < _HEADER_SIZE),
            Access(COMMAND, reached, 2),
            *map(_in_memory, table, state.table),
            *(write for write in writes if write.address >= _HEADER_SIZE),
            Access(COMMAND, state.command, 2),
            *map(Access, words),
        ]
    )
    config = bytearray(STANDARD_SIZE)
    _put(config, words, found)
    _check(state, PciState(bytes(config)), written)


def _check(state: PciState, there: PciState, written: Sequence[Register]) -> None:
    for register in written:
        if _differs(register, state, there):
            wanted, got = _value(register, state), _value(register, there)
            raise QemuError(
                f"the register at {register.offset:#x} of its configuration space is {got:#x} after"
                f" {wanted:#x} was written"
            )


def _value(register: Register, state: PciState) -> int:
    return state.load(register.offset, register.size) & register.mask


def _differs(register: Register, state: PciState, other: PciState) -> bool:
    return _value(register, state) != _value(register, other)


def _write(register: Register, state: PciState, fresh: PciState) -> Access:
    kept = fresh.load(register.offset, register.size) & ~register.mask
    return Access(register.offset, _value(register, state) | kept, register.size)


def _in_memory(address: int, value: int | None = None) -> Access:
    return Access(address, value, memory=True)


async def _read(access: PciAccess, config: bytearray, offsets: Sequence[int]) -> None:
    _put(config, offsets, await access.run(list(map(Access, offsets))))


def _put(config: bytearray, offsets: Sequence[int], words: Sequence[int]) -> None:
    for offset, word in zip(offsets, words, strict=True):
        config[offset : offset + 4] = (word & 0xFFFF_FFFF).to_bytes(4, "little")


def _chain(config: bytes | bytearray) -> Iterator[int]:
    """Offsets of the capabilities that have been read so far, and of the next; each once."""
    if not config[STATUS] & Status.CAPABILITIES_LIST:
        return
    seen: set[int] = set()
    offset = config[CAPABILITIES_POINTER] & ~3
    while offset >= _HEADER_SIZE and offset not in seen:
        seen.add(offset)
        yield offset
        offset = config[offset + 1] & ~3


def _words(config: bytes | bytearray, offset: int) -> range:
    """The words of the capability at `offset` behind its first, as far as they may be read."""
    return range(offset + 4, min(offset + _size(config, offset), STANDARD_SIZE), 4)


def _size(config: bytes | bytearray, offset: int) -> int:
    """How many bytes of the capability at `offset` may be read."""
    if config[offset] != _VENDOR:
        return _SIZES.get(config[offset], 4)
    access = config[offset + 3] == _VIRTIO_PCI_ACCESS
    return _VIRTIO_SIZE if access else max(4, config[offset + 2])
