"""Where the test bed lies and how its programs are run.

The bed is an unpacked tree of Debian packages (`provision`), newer than the system that it lies
on.  Its dynamic programs therefore run by the loader and the libraries of that tree, which small
scripts in `bin` see to; nothing is installed and no path is compiled in, so the folder may be
moved.  A chroot was rejected: it needs root and hides the sockets and TAP devices of a test.
Standard library only.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

FORMAT: Final = 3
"""Counts up when the layout of the bed's folder changes."""

SUITES: Final = ("trixie", "trixie-backports")
"""The last one is preferred: it has QEMU 11 and a current kernel."""

KERNEL: Final = "linux-image-cloud-amd64"
PROGRAMS: Final = (
    "qemu-system-x86",
    "ovmf",
    "busybox-static",
    "iproute2",
    "ethtool",
    "iperf3",
    "passt",
    "zstd",
)


COMMANDS: Final = {
    "ethtool": "",
    "ip": "",
    "iperf3": "",
    "passt": "",
    "qemu-system-x86_64": '-L "$sys/share/qemu" -L "$sys/share/seabios" -L "$sys/lib/ipxe/qemu"',
    "zstd": "",
}
"""The programs that `bin` runs, and the arguments that each always gets."""

SCRIPT: Final = """\
#!/bin/sh
sys=${{0%/*}}/../sys/usr
libraries=$sys/lib/x86_64-linux-gnu
export QEMU_MODULE_DIR="$libraries/qemu"
exec "$sys/lib64/ld-linux-x86-64.so.2" --library-path "$libraries:$libraries/libproxy" \\
    --argv0 {name} "${{0%/*}}/../sys/{program}" {arguments} "$@"
"""


def cache_root() -> Path:
    """The project's cache folder, after the XDG base directory specification."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    root = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
    return root / "vfio-user-virtio"


def key() -> str:
    """Names a bed by what it is made from."""
    recipe = json.dumps([FORMAT, SUITES, KERNEL, PROGRAMS])
    return hashlib.sha256(recipe.encode()).hexdigest()[:12]


class TestbedMissing(Exception):
    """The bed is not there; the message says how to get it."""

    __test__ = False


@dataclass(frozen=True)
class Bed:
    """One provisioned bed.

    `root` holds `sys` (the unpacked packages), `bin` (what runs their programs), `vmlinux` (the
    kernel as an ELF file, for PVH), `bzImage` (the same as firmware loads it) and `manifest.json`.
    """

    root: Path

    @classmethod
    def find(cls) -> Bed:
        """The bed in the cache; raises `TestbedMissing`."""
        bed = cls(cache_root() / f"testbed-{key()}")
        if not bed.manifest.is_file():
            raise TestbedMissing(f"no test bed in {bed.root}; `make setup` provides it")
        return bed

    @property
    def sys(self) -> Path:
        return self.root / "sys"

    @property
    def bin(self) -> Path:
        return self.root / "bin"

    @property
    def manifest(self) -> Path:
        return self.root / "manifest.json"

    @property
    def libraries(self) -> Path:
        return self.sys / "usr/lib/x86_64-linux-gnu"

    @property
    def loader(self) -> Path:
        return self.sys / "usr/lib64/ld-linux-x86-64.so.2"

    @property
    def vmlinux(self) -> Path:
        return self.root / "vmlinux"

    @property
    def bzimage(self) -> Path:
        return self.root / "bzImage"

    @property
    def modules(self) -> Path:
        (tree,) = (self.sys / "usr/lib/modules").iterdir()
        return tree

    @property
    def busybox(self) -> Path:
        return self.find_program("busybox")

    @property
    def ovmf(self) -> tuple[Path, Path]:
        """Code and variables of the 4 MiB OVMF build."""
        folder = self.sys / "usr/share/OVMF"
        return folder / "OVMF_CODE_4M.fd", folder / "OVMF_VARS_4M.fd"

    def find_program(self, name: str) -> Path:
        for folder in ("usr/bin", "usr/sbin", "bin", "sbin"):
            path = self.sys / folder / name
            if path.exists():
                return path
        raise TestbedMissing(f"{name} is not in {self.sys}; remove {self.root} and `make setup`")

    def command(self, name: str) -> list[str]:
        """The argument vector that runs one of `COMMANDS` on this system."""
        return [str(self.bin / name)]

    def applet(self, name: str) -> list[str]:
        """The argument vector of a busybox applet on this system."""
        return [str(self.busybox), name]

    def qemu(self) -> list[str]:
        """QEMU, which finds its firmware."""
        return self.command("qemu-system-x86_64")

    def write_commands(self) -> None:
        """The scripts in `bin`, one for each of `COMMANDS`."""
        self.bin.mkdir()
        for name, arguments in COMMANDS.items():
            program = self.find_program(name).relative_to(self.sys)
            script = self.bin / name
            script.write_text(SCRIPT.format(name=name, program=program, arguments=arguments))
            script.chmod(0o755)

    def versions(self) -> dict[str, str]:
        """Package name to version, as they were fetched."""
        versions: dict[str, str] = json.loads(self.manifest.read_text())["packages"]
        return versions

    def describe(self) -> str:
        qemu = self.versions()["qemu-system-x86"]
        return f"QEMU {qemu}, Linux {self.modules.name}, in {self.root}"
