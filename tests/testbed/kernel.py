"""The kernel as the guest wants it: an ELF file, and modules in the order that they load.

A bzImage unpacks itself, which costs a second under emulation; QEMU starts the unpacked ELF file
by its PVH note instead.  Modules are decompressed on the host for the same reason.  The layout is
Documentation/arch/x86/boot.rst's; depmod's files were rejected, as the packages do not hold them
and a module tells its own dependencies.  Standard library only.
"""

from __future__ import annotations

import gzip
import lzma
import re
import struct
import subprocess
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

SETUP_SECTORS: Final = 0x1F1
PAYLOAD: Final = struct.Struct("<II")
"""payload_offset, counted from the end of the set-up sectors, and payload_length."""
PAYLOAD_AT: Final = 0x248


def unpack_vmlinux(bzimage: bytes, zstd: Sequence[str]) -> bytes:
    """The ELF file in a bzImage; `zstd` is the command that decompresses its input."""
    offset, length = PAYLOAD.unpack_from(bzimage, PAYLOAD_AT)
    start = (bzimage[SETUP_SECTORS] + 1) * 512 + offset
    payload = bzimage[start : start + length]
    if payload.startswith(b"\xfd7zXZ\0"):
        elf = lzma.LZMADecompressor().decompress(payload)
    elif payload.startswith(b"\x1f\x8b"):
        elf = gzip.decompress(payload[:-4])  # the last four bytes are the unpacked size
    else:
        command = [*zstd, "-d", "-c", "-q"]
        done = subprocess.run(command, input=payload[:-4], check=True, capture_output=True)
        elf = done.stdout
    if not elf.startswith(b"\x7fELF"):
        raise ValueError(f"the kernel's payload is {elf[:4]!r}…, not an ELF file")
    return elf


class Modules:
    """The modules of one kernel's tree; `-` and `_` are the same in a module's name."""

    def __init__(self, tree: Path) -> None:
        self._files = {
            path.name.partition(".ko")[0].replace("-", "_"): path for path in tree.rglob("*.ko*")
        }
        builtin = (tree / "modules.builtin").read_text().split()
        self._builtin = {
            line.rpartition("/")[2].removesuffix(".ko").replace("-", "_") for line in builtin
        }

    def load_order(self, names: Iterable[str]) -> dict[str, bytes]:
        """Name to decompressed module, each after those that it depends on.

        Built-in ones are left out; raises `KeyError` for one that the kernel does not have.
        """
        order: dict[str, bytes] = {}
        for name in names:
            self._add(name.replace("-", "_"), order)
        return order

    def _add(self, name: str, order: dict[str, bytes]) -> None:
        if name in order or name in self._builtin:
            return
        path = self._files[name]
        data = path.read_bytes()
        if path.suffix == ".xz":
            data = lzma.decompress(data)
        for depends in re.findall(rb"\0depends=([^\0]+)", data):
            for other in depends.decode().split(","):
                self._add(other.replace("-", "_"), order)
        order[name] = data
