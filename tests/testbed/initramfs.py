"""The guest's whole user space: busybox, a few programs with their libraries, modules, the agent.

There is no disk: an initial RAM file system of a few megabytes, not compressed, is in memory
before the first instruction runs, which under emulation is much the quickest.  A place is left for
more (`files`), such as a Python with its library.
"""

from __future__ import annotations

import functools
import re
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tests.testbed.cpio import Archive
from tests.testbed.kernel import Modules

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tests.testbed.bed import Bed

INIT: Final = Path(__file__).with_name("init.sh")
LOADER: Final = "lib64/ld-linux-x86-64.so.2"
CONSOLE: Final = (5, 1)
"""Device number of /dev/console (Documentation/admin-guide/devices.txt)."""

PTHREAD_CANCEL: Final = "libgcc_s.so.1"
"""glibc loads it when a thread is cancelled, so that no list of libraries names it."""


@functools.cache
def build(
    bed: Bed,
    modules: tuple[str, ...],
    programs: tuple[str, ...] = (),
    files: tuple[tuple[str, Path], ...] = (),
) -> bytes:
    """An archive whose init loads `modules` in order and then serves the agent's commands.

    `programs` are names in the bed and land in `/programs`, first in the path; `files` are pairs
    of a name in the guest and a file here.
    """
    archive = Archive()
    for folder in ("bin", "dev", "proc", "sys", "tmp", "run"):
        archive.folder(folder)
    archive.character_device("dev/console", *CONSOLE)
    archive.file("bin/busybox", bed.busybox.read_bytes())
    archive.file("init", INIT.read_bytes())
    loaded = Modules(bed.modules).load_order(modules)
    for number, (name, data) in enumerate(loaded.items()):
        archive.file(f"modules/{number:02}-{name}.ko", data)
    _add_programs(archive, bed, programs)
    for name, path in files:
        archive.file(name, path.read_bytes())
    return archive.finish()


def _add_programs(archive: Archive, bed: Bed, programs: Iterable[str]) -> None:
    for name in programs:
        path = bed.find_program(name)
        archive.file(f"programs/{name}", path.read_bytes())
        archive.file(LOADER, bed.loader.read_bytes())
        command = [str(bed.loader), "--library-path", str(bed.libraries), "--list", str(path)]
        listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        needed = re.findall(r"=> (/\S+) \(0x", listed)
        for library in [*map(Path, needed), bed.libraries / PTHREAD_CANCEL]:
            archive.file(f"lib/{library.name}", library.read_bytes())
