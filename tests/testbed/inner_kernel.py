"""Builds the inner host's kernel: `python3 -m tests.testbed.inner_kernel`.

No Debian kernel has iommufd, VFIO character devices or noiommu mode, so the inner host's is built
from Debian's own kernel source package, of the release that the bed's kernel has, with the options
of `inner_kernel.config` and nothing else.  It goes to the cache under a name that follows from that
file and that release, and is built once.

Beside gcc and make the build wants a few programs that a small system lacks (bison, bc, …).  They
are unpacked from the packages of the system's own Debian release, so that they run with its
libraries, and are told by their environment where they lie; nothing is installed.  Only the ELF
file is made, as the guest starts by its PVH note.  Modules for Debian's own kernel image were
rejected: what they add to (iommu, vfio) is built there without what they need.
Standard library only.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import lzma
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Final

from tests.testbed import bed as beds
from tests.testbed import provision
from tests.testbed.provision import Apt, ProvisionError, run

if TYPE_CHECKING:
    from collections.abc import Iterator

FORMAT: Final = 1
"""Counts up when what this file makes changes."""

FRAGMENT: Final = Path(__file__).with_name("inner_kernel.config")
TOOLS: Final = ("bc", "bison", "flex", "m4", "libelf-dev")
TOOL_LIBRARIES: Final = re.compile(r"lib(elf|readline|tinfo|zstd)|zlib1g")
"""What the tools need beyond the C library, which is the system's own."""

UNUSED: Final = re.compile(
    r"Documentation/|arch/(?!x86/|Kconfig|\.)|sound/|samples/|tools/(testing|perf)/"
    r"|drivers/(gpu|media|staging|infiniband|scsi)/|drivers/net/(ethernet|wireless)/|fs/(xfs|btrfs)/"
)
"""Folders of the source of which only what the configuration reads is unpacked: half of it."""
ALWAYS: Final = re.compile(r"Kconfig|Makefile|Kbuild")

NICENESS: Final = 10


class InnerKernelMissing(Exception):
    """The kernel is not there; the message says how to get it."""


def say(text: str) -> None:
    print(f"inner kernel: {text}", flush=True)


def release(bed: beds.Bed) -> str:
    """The version of Debian's kernel source that belongs to the bed's kernel."""
    return bed.versions()[beds.KERNEL]


def folder(bed: beds.Bed) -> Path:
    """Where the kernel lies in the cache, by what it is made from."""
    recipe = json.dumps([FORMAT, release(bed), FRAGMENT.read_text()])
    digest = hashlib.sha256(recipe.encode()).hexdigest()[:12]
    return beds.cache_root() / f"inner-kernel-{digest}"


def find(bed: beds.Bed) -> Path:
    """The kernel as an ELF file with a PVH note; raises `InnerKernelMissing`."""
    vmlinux = folder(bed) / "vmlinux"
    if not vmlinux.is_file():
        raise InnerKernelMissing(f"no kernel in {vmlinux.parent}; `make inner-kernel` builds it")
    return vmlinux


class Tools:
    """The build's programs, in a folder of their own, and the environment that they need."""

    def __init__(self, root: Path) -> None:
        self.root = root
        libraries = root / "usr/lib/x86_64-linux-gnu"
        self.env = {
            **os.environ,
            "PATH": f"{root / 'usr/bin'}:{os.environ['PATH']}",
            "LD_LIBRARY_PATH": f"{libraries}:{root / 'lib/x86_64-linux-gnu'}",
            "M4": str(root / "usr/bin/m4"),
            "BISON_PKGDATADIR": str(root / "usr/share/bison"),
            "LC_ALL": "C",
            "KBUILD_BUILD_TIMESTAMP": "@0",
            "KBUILD_BUILD_USER": "inner",
            "KBUILD_BUILD_HOST": "kernel",
        }
        self.variables = (
            f"HOSTCFLAGS=-I{root / 'usr/include'}",
            f"HOSTLDFLAGS=-L{libraries}",
            "HOSTPKG_CONFIG=false",  # the system's would not find what lies here
        )

    def fetch(self, apt: Apt) -> None:
        found = apt.closure(TOOLS)
        wanted = [name for name in found if name in TOOLS or TOOL_LIBRARIES.match(name)]
        unpack(apt, {name: found[name] for name in wanted}, self.root)


def unpack(apt: Apt, packages: dict[str, str], root: Path) -> None:
    """Downloads and unpacks packages, name to version."""
    apt("apt-get", "--quiet", "download", *(f"{name}={packages[name]}" for name in packages))
    root.mkdir(exist_ok=True)
    for deb in sorted(apt.debs.glob("*.deb")):
        run(["dpkg-deb", "--extract", str(deb), str(root)])
        deb.unlink()


def system_suite() -> str:
    """The code name of the Debian release that this system is."""
    codename = platform.freedesktop_os_release().get("VERSION_CODENAME", "")
    if not codename:
        raise ProvisionError("no VERSION_CODENAME in os-release; the build needs a Debian release")
    return codename


def fetch_source(apt: Apt, bed: beds.Bed, root: Path) -> tuple[Path, str]:
    """The archive of the kernel's source, and its version: the bed's, or the mirror's newest."""
    wanted = release(bed)
    match = re.match(r"(\d+\.\d+)", wanted)
    if match is None:
        raise ProvisionError(f"the bed's kernel is of version {wanted}, expected NUMBER.NUMBER…")
    name = f"linux-source-{match[1]}"
    offered = re.findall(r"^Version: (.*)$", apt("apt-cache", "show", name), re.MULTILINE)
    if not offered:
        raise ProvisionError(f"{name} is in none of {beds.SUITES}; remove {bed.root}, `make setup`")
    version = wanted if wanted in offered else offered[0]
    say(f"downloading {name} {version}, about 170 MB")
    unpack(apt, {name: version}, root)
    (archive,) = root.glob("usr/src/linux-source-*.tar.xz")
    return archive, version


def extract_source(archive: Path, root: Path) -> Path:
    """Unpacks what a build needs; the folder that it is in."""

    def members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
        for member in tar:
            path = PurePosixPath(member.name)
            inner = "/".join(path.parts[1:])
            if not UNUSED.match(inner) or ALWAYS.match(path.name):
                yield member

    with lzma.open(archive) as file, tarfile.open(fileobj=file, mode="r|") as tar:
        if sys.version_info >= (3, 12):  # Debian 12's Python has no filters
            tar.extraction_filter = tarfile.tar_filter
        tar.extractall(root, members=members(tar))
    (tree,) = root.glob("linux-source-*")
    return tree


def check_config(tree: Path) -> None:
    """Every option of the fragment is in the configuration; raises `ProvisionError`."""
    config = set((tree / ".config").read_text().splitlines())
    asked = {line for line in FRAGMENT.read_text().splitlines() if line.startswith("CONFIG_")}
    if missing := sorted(asked - config):
        raise ProvisionError(f"the kernel's configuration dropped {', '.join(missing)}")


def compile_kernel(tree: Path, tools: Tools, log: Path) -> None:
    """Configures and compiles; leaves `vmlinux` in the tree."""
    jobs = str(os.cpu_count() or 1)
    with log.open("w") as file:

        def make(*argv: str) -> None:
            done = subprocess.run(
                ["nice", "-n", str(NICENESS), "make", "-s", "-j", jobs, *tools.variables, *argv],
                cwd=tree,
                env=tools.env,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                check=False,
            )
            if done.returncode:
                kept = beds.cache_root() / "inner-kernel.log"
                shutil.copy(log, kept)
                tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
                raise ProvisionError(f"`make {argv[0]}` failed; all of it is in {kept}:\n{tail}")

        make("allnoconfig", f"KCONFIG_ALLCONFIG={FRAGMENT}")
        check_config(tree)
        make("vmlinux")


def build_in(root: Path, bed: beds.Bed) -> None:
    """Makes the whole in the empty folder `root`, of which `vmlinux` and two records stay."""
    started = time.monotonic()
    work = root / "work"
    work.mkdir()
    mirror = provision.find_mirror()
    say("fetching what the build needs from the system's mirror")
    tools = Tools(work / "tools")
    system = Apt(work / "apt-system", mirror, (system_suite(),))
    system("apt-get", "--quiet", "update")
    tools.fetch(system)
    apt = Apt(work / "apt", mirror)
    apt("apt-get", "--quiet", "update")
    archive, version = fetch_source(apt, bed, work)
    say("unpacking the source")
    tree = extract_source(archive, work)
    archive.unlink()
    say("building, about 6 minutes once")
    compile_kernel(tree, tools, work / "build.log")
    run(["objcopy", "--strip-all", str(tree / "vmlinux"), str(root / "vmlinux")])
    shutil.copy(tree / ".config", root / "config")
    (root / "manifest.json").write_text(json.dumps({"linux-source": version}, indent=1) + "\n")
    shutil.rmtree(work)
    say(f"done in {time.monotonic() - started:.0f} s")


def build() -> Path:
    """The kernel of the cache, built first if it is not there; raises `ProvisionError`.

    It appears under its name only when it is whole; a second process that wants it at the same
    time waits for the first.
    """
    bed = provision.provision()
    with contextlib.suppress(InnerKernelMissing):
        return find(bed)
    cache = beds.cache_root()
    with (cache / "inner-kernel.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with contextlib.suppress(InnerKernelMissing):
            return find(bed)
        partial = cache / "inner-kernel.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            build_in(partial, bed)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        partial.rename(folder(bed))
    return find(bed)


def main() -> int:
    try:
        vmlinux = build()
    except ProvisionError as error:
        say(f"error: {error}")
        return 1
    say(str(vmlinux))
    return 0


if __name__ == "__main__":
    sys.exit(main())
