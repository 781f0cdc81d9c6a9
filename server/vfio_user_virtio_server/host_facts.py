"""What this host has for serving physical VFs, found without changing or opening anything.

Each `Fact` is one line of ``vfio-user-virtio check``: what was looked at, what was found, and if
that is not enough, the command that mends it.  A device is never opened: opening resets it, and a
guest may be using it.  What only an open device tells (whether an owner has the device-parts
capability, whether the IOMMU tracks what is dirty) is said to be unknown, unless the kernel's own
driver has written it in sysfs.

Everything is read below a `Roots`, so that a test gives its own.
"""

from __future__ import annotations

import enum
import gzip
import os
import re
import resource
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Final

import attrs

if TYPE_CHECKING:
    from collections.abc import Iterator

OLDEST_QEMU: Final = (10, 1)
"""The first release with vfio-user-pci."""

_QEMU_SECONDS: Final = 20
_QEMU_VERSION: Final = re.compile(r"QEMU emulator version (\d+)\.(\d+)")
_CAPABILITIES: Final = re.compile(r"^CapEff:\s*([0-9a-f]+)$", re.MULTILINE)
_CAP_IPC_LOCK: Final = 14
_KERNEL_OPTIONS: Final = {
    "CONFIG_PCI_IOV": "SR-IOV: no VFs",
    "CONFIG_VFIO_PCI": "vfio-pci: no VF can be served",
    "CONFIG_IOMMUFD": "iommufd: groups are used, and dirty pages are not tracked by the IOMMU",
    "CONFIG_VFIO_DEVICE_CDEV": "nodes of devices: groups are used",
}
"""What is missing without an option of the kernel; the last two can be done without."""
_DISPENSABLE: Final = frozenset(("CONFIG_IOMMUFD", "CONFIG_VFIO_DEVICE_CDEV"))


class Verdict(enum.Enum):
    """GOOD; LESS: works, but something is lost; BAD: does not work; UNKNOWN: cannot be seen."""

    GOOD = "ok"
    LESS = "less"
    BAD = "MISSING"
    UNKNOWN = "unknown"


@attrs.frozen
class Fact:
    """`what` was looked at, what was `found`, and the `remedy`, a command where there is one."""

    what: str
    verdict: Verdict
    found: str
    remedy: str = ""


@attrs.frozen
class Roots:
    """Where the host's trees are."""

    sys: Path = Path("/sys")
    dev: Path = Path("/dev")
    proc: Path = Path("/proc")
    boot: Path = Path("/boot")


def host_facts(roots: Roots, qemu: str) -> Iterator[Fact]:
    """All that concerns no single device; `qemu` is a path, or a name to look up in PATH."""
    yield _iommu(roots)
    yield _vfio_pci(roots)
    yield _node(
        "groups and containers",
        roots.dev / "vfio/vfio",
        Verdict.BAD,
        "modprobe vfio_iommu_type1",
    )
    yield _node("iommufd", roots.dev / "iommu", Verdict.LESS, "modprobe iommufd")
    yield _noiommu(roots)
    yield from _kernel_options(roots)
    yield locked_memory(roots)
    yield _node(
        "TAP devices, for the software model", roots.dev / "net/tun", Verdict.LESS, "modprobe tun"
    )
    yield _qemu(qemu)


def _iommu(roots: Roots) -> Fact:
    units = _names(roots.sys / "class/iommu")
    if units:
        groups = len(_names(roots.sys / "kernel/iommu_groups"))
        return Fact("IOMMU", Verdict.GOOD, f"{', '.join(units)}; groups: {groups}")
    return Fact(
        "IOMMU",
        Verdict.BAD,
        "none in use",
        "switch VT-d or AMD-Vi on in the firmware, and boot Linux with intel_iommu=on",
    )


def _vfio_pci(roots: Roots) -> Fact:
    if (roots.sys / "bus/pci/drivers/vfio-pci").is_dir():
        return Fact("driver vfio-pci", Verdict.GOOD, "loaded")
    return Fact("driver vfio-pci", Verdict.BAD, "not loaded", "modprobe vfio-pci")


def _node(what: str, path: Path, without: Verdict, remedy: str) -> Fact:
    if not path.exists():
        return Fact(what, without, f"there is no {path}", remedy)
    return access(what, path, without)


def access(what: str, path: Path, without: Verdict) -> Fact:
    """Whether this user may use a device's node; `without` is what it means if not."""
    if os.access(path, os.R_OK | os.W_OK):
        return Fact(what, Verdict.GOOD, str(path))
    return Fact(
        what,
        without,
        f"this user may not read and write {path}",
        f"setfacl -m u:{os.getuid()}:rw {path}",
    )


def _noiommu(roots: Roots) -> Fact:
    parameter = roots.sys / "module/vfio/parameters/enable_unsafe_noiommu_mode"
    if text_of(parameter) in ("Y", "1"):
        return Fact(
            "devices without an IOMMU",
            Verdict.LESS,
            "allowed: they can write all of this host's memory",
            f"echo N > {parameter}",
        )
    return Fact("devices without an IOMMU", Verdict.GOOD, "not allowed")


def _kernel_options(roots: Roots) -> Iterator[Fact]:
    release = os.uname().release
    config = _kernel_config(roots, release)
    if config is None:
        places = f"{roots.boot}/config-{release} or {roots.proc}/config.gz"
        yield Fact("options of the kernel", Verdict.UNKNOWN, f"Linux {release} has no {places}")
        return
    missing = [name for name in _KERNEL_OPTIONS if f"\n{name}=" not in config]
    if not missing:
        yield Fact("options of the kernel", Verdict.GOOD, f"Linux {release} has all of them")
    for name in missing:
        yield Fact(
            f"kernel with {name}",
            Verdict.LESS if name in _DISPENSABLE else Verdict.BAD,
            f"Linux {release} has no {_KERNEL_OPTIONS[name]}",
            "boot a kernel that has it",
        )


def _kernel_config(roots: Roots, release: str) -> str | None:
    text = text_of(roots.boot / f"config-{release}")
    if text is not None:
        return "\n" + text
    try:
        return "\n" + gzip.decompress((roots.proc / "config.gz").read_bytes()).decode()
    except OSError:
        return None


def locked_memory(roots: Roots) -> Fact:
    """All memory of a guest is locked while a device can reach it; CAP_IPC_LOCK has no limit."""
    what = "memory that may be locked"
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft == resource.RLIM_INFINITY:
        return Fact(what, Verdict.GOOD, "no limit")
    capabilities = _CAPABILITIES.search(text_of(roots.proc / "self/status") or "")
    if capabilities is not None and int(capabilities[1], 16) >> _CAP_IPC_LOCK & 1:
        return Fact(what, Verdict.GOOD, "no limit for this user (CAP_IPC_LOCK)")
    shown = f"{soft >> 20} MiB, where a guest needs all that it has"
    if hard == resource.RLIM_INFINITY:
        return Fact(what, Verdict.BAD, shown, "ulimit -l unlimited")
    return Fact(what, Verdict.BAD, shown, "LimitMEMLOCK=infinity in the unit of the service")


def _qemu(command: str) -> Fact:
    path = shutil.which(command)
    if path is None:
        return Fact("QEMU", Verdict.LESS, f"there is no {command} here", "check --qemu PATH")
    said = _output(path, "--version")
    match = _QEMU_VERSION.search(said)
    if match is None:
        return Fact("QEMU", Verdict.UNKNOWN, f"{path} does not say its version: {said[:60]!r}")
    version = int(match[1]), int(match[2])
    shown = f"{path} is QEMU {version[0]}.{version[1]}"
    if version < OLDEST_QEMU:
        oldest = ".".join(map(str, OLDEST_QEMU))
        return Fact("QEMU", Verdict.BAD, shown, f"install QEMU {oldest} or newer")
    if "vfio-user-pci" not in _output(path, "-device", "help"):
        return Fact("QEMU", Verdict.BAD, f"{shown}, without vfio-user-pci", "build it in")
    return Fact("QEMU", Verdict.GOOD, f"{shown}, with vfio-user-pci")


def _output(*command: str) -> str:
    """What a command prints, on either stream; nothing if it cannot be run."""
    try:
        done = subprocess.run(
            command, capture_output=True, timeout=_QEMU_SECONDS, check=False, text=True
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout + done.stderr


def text_of(path: Path) -> str | None:
    """The content of a small file; None if there is none, or none for this user."""
    try:
        return path.read_text().strip()
    except OSError:
        return None


def _names(path: Path) -> list[str]:
    try:
        return sorted(os.listdir(path))
    except OSError:
        return []
