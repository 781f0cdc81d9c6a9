"""A block of registers that behaves bit by bit as declared, at any access size and alignment.

PCI defines what a register does per bit (read-only, read-write, write-1-to-clear), while accesses
come in bytes: one, two or four of them as a rule, all 4,096 of a configuration space at QEMU's
start, and anything from a hostile client.  So a block is one ``bytearray`` of values and one
``bytes``-like mask per behaviour, and an access is a few operations on integers as wide as the
access, whatever registers it straddles.  What a register *means* is no business of this file: see
`vfio_user_virtio.pci.config_space` for how writes become events.

Modelled on the masks that QEMU keeps beside ``PCIDevice.config`` (``wmask``, ``w1cmask``).  A
table of field objects with callbacks was rejected: it costs a search per access, and accesses that
cut or straddle fields need the masks anyway.

All registers are little-endian.  Bytes that were never declared are reserved: read-only zeros.
"""

from __future__ import annotations

import errno

from vfio_user_virtio.errors import ClientError


class RegisterBlock:
    """`size` bytes of registers: `declare` them, then `read`, `write` and `reset`.

    The values are the whole state: `state` gives them, `restore_untrusted` takes them back.
    """

    __slots__ = (
        "_clearable",
        "_declared",
        "_defaults",
        "_values",
        "_view",
        "_volatile",
        "_writable",
        "size",
    )

    def __init__(self, size: int) -> None:
        self.size = size
        self._values = bytearray(size)
        self._view = memoryview(self._values).toreadonly()
        self._defaults = bytearray(size)
        self._writable = bytearray(size)
        self._clearable = bytearray(size)
        self._volatile = bytearray(size)
        self._declared = bytearray(size)

    def declare(
        self,
        offset: int,
        size: int,
        value: int = 0,
        *,
        writable: int = 0,
        write_1_to_clear: int = 0,
        volatile: int = 0,
    ) -> None:
        """Declare the register of `size` bytes at `offset`: its default and what its bits do.

        A bit in `writable` takes what is written, one in `write_1_to_clear` is cleared by writing
        1, all others are read-only.  `volatile` are read-only bits that the device changes itself
        (`store`).  Raises ValueError for a register that does not fit, overlaps another, or has
        bits outside itself or in two masks: those are mistakes in the program.
        """
        end = offset + size
        if not 0 <= offset < end <= self.size:
            raise ValueError(f"register {offset:#x}+{size} is outside the block of {self.size}")
        if any(self._declared[offset:end]):
            raise ValueError(f"register {offset:#x}+{size} overlaps one declared before")
        if (value | writable | write_1_to_clear | volatile) >> (8 * size):
            raise ValueError(f"register {offset:#x}+{size} has bits beyond its size")
        if writable & write_1_to_clear or (writable | write_1_to_clear) & volatile:
            raise ValueError(f"register {offset:#x}+{size} has bits with two behaviours")
        self._declared[offset:end] = b"\1" * size
        self._writable[offset:end] = writable.to_bytes(size, "little")
        self._clearable[offset:end] = write_1_to_clear.to_bytes(size, "little")
        self._volatile[offset:end] = volatile.to_bytes(size, "little")
        self.set_default(offset, size, value)

    def set_default(self, offset: int, size: int, value: int) -> None:
        """Change the default of a register, and its value with it (while a device is built)."""
        self._defaults[offset : offset + size] = value.to_bytes(size, "little")
        self.store(offset, size, value)

    def read(self, offset: int, count: int) -> bytes:
        """`count` bytes at `offset`.  Raises ClientError (EINVAL) outside the block."""
        end = offset + count
        if not 0 <= offset <= end <= self.size:
            raise self._outside(offset, count)
        return bytes(self._view[offset:end])

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Write as a client does, each bit as declared.

        Raises ClientError (EINVAL) outside the block.
        """
        count = len(data)
        end = offset + count
        if not 0 <= offset <= end <= self.size:
            raise self._outside(offset, count)
        new = int.from_bytes(data, "little")
        old = int.from_bytes(self._view[offset:end], "little")
        writable = int.from_bytes(self._writable[offset:end], "little")
        clearable = int.from_bytes(self._clearable[offset:end], "little")
        value = (old & ~writable | new & writable) & ~(new & clearable)
        self._values[offset:end] = value.to_bytes(count, "little")

    def load(self, offset: int, size: int) -> int:
        """The register of `size` bytes at `offset`, for the device itself; not range-checked."""
        return int.from_bytes(self._view[offset : offset + size], "little")

    def store(self, offset: int, size: int, value: int) -> None:
        """Set a register as the device does: past every mask, not range-checked."""
        self._values[offset : offset + size] = value.to_bytes(size, "little")

    def reset(self) -> None:
        """Every register back to its default."""
        self._values[:] = self._defaults

    def state(self) -> bytes:
        """Every value; what `restore_untrusted` takes."""
        return bytes(self._values)

    def restore_untrusted(self, state: bytes) -> None:
        """Take `state` of a block declared like this one.

        Raises ClientError (EINVAL), having changed nothing, when the size differs or a bit that
        nobody can change does: then it is the state of another kind of device.
        """
        if len(state) != self.size:
            raise ClientError(
                errno.EINVAL,
                f"register state has {len(state)} bytes, this block has {self.size}",
            )
        for offset in range(self.size):
            fixed = ~(self._writable[offset] | self._clearable[offset] | self._volatile[offset])
            if (state[offset] ^ self._defaults[offset]) & fixed:
                raise ClientError(
                    errno.EINVAL,
                    f"register state has {state[offset]:#04x} at {offset:#x} where this device is"
                    f" fixed to {self._defaults[offset]:#04x}: it is another kind of device's",
                )
        self._values[:] = state

    def _outside(self, offset: int, count: int) -> ClientError:
        return ClientError(
            errno.EINVAL,
            f"access of {count} bytes at {offset:#x} is outside the {self.size} bytes of registers",
        )
