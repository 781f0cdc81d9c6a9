"""This Python with what the project's tests need, as a cpio archive for a guest without 9p.

Debian's cloud kernel cannot mount the host's files by 9p, so that its initial RAM file system gets
them, each under the path that it has here: the interpreter, the standard library without its own
tests, the virtual environment's packages that the project and pytest are made of, the project, and
the shared libraries of all of it.  Times are kept, or every .pyc would be stale, which costs four
seconds under emulation.  An image on a disk (erofs, ext4) was rejected: it is no faster and wants
a program that makes it.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Final

from packaging.requirements import Requirement

from tests.testbed.cpio import Archive

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

PROJECT: Final = Path(__file__).resolve().parents[2]
PARTS: Final = ("pyproject.toml", "vfio_user_virtio", "server", "tests")
DISTRIBUTIONS: Final = ("vfio-user-virtio", "pytest", "pytest-trio")
UNUSED: Final = re.compile(
    r"_?tests?|idlelib|tkinter|turtledemo|lib2to3|ensurepip|distutils|pydoc_data|config-.*"
    r"|.*-packages"
)
"""Folders of the standard library and of the packages that stay behind."""
SKIPPED: Final = re.compile(
    r".*\.(a|opt-[12]\.pyc|pyc\.\d+|log|sock)|(_tkinter|_sqlite3|_test|_curses|_codecs_|xx).*\.so"
)
"""Files that do: the libraries that they want are as large as all the others."""

LOADER: Final = Path("/lib64/ld-linux-x86-64.so.2")
LIBGCC: Final = Path("/lib/x86_64-linux-gnu/libgcc_s.so.1")
"""glibc loads it when a thread ends early, so that no list of libraries names it."""


def write(path: Path) -> None:
    """Writes the archive, some 80 MB."""
    files = {*_standard_library(), *_distributions(), *_project()}
    interpreter = Path(sys.executable)
    files.add(Path(sys.prefix, "pyvenv.cfg"))
    archive = Archive()
    while interpreter.is_symlink():
        target = os.readlink(interpreter)
        archive.link(_name(interpreter), target)
        interpreter = interpreter.parent / target
    files.add(interpreter)
    programs = [interpreter, *(file for file in files if ".so" in file.suffixes)]
    files.update(_libraries(programs))
    for file in sorted(files):
        status = file.stat()
        archive.file(_name(file), file.read_bytes(), status.st_mode & 0o777, int(status.st_mtime))
    path.write_bytes(archive.finish())


def _name(path: Path) -> str:
    return os.path.normpath(path).lstrip("/")


def _below(root: Path) -> Iterator[Path]:
    for top, folders, names in os.walk(root):
        if root != PROJECT / "tests":
            folders[:] = [name for name in folders if not UNUSED.fullmatch(name)]
        yield from (Path(top, name) for name in names if not SKIPPED.fullmatch(name))


def _standard_library() -> Iterator[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    for path in root.iterdir():
        if path.is_file():
            yield path
        elif not UNUSED.fullmatch(path.name):
            yield from _below(path)


def _distributions() -> Iterator[Path]:
    """The files of `DISTRIBUTIONS` and of all that they require."""
    todo = list(DISTRIBUTIONS)
    seen: set[str] = set()
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        distribution = metadata.distribution(name)
        for file in distribution.files or ():
            path = Path(os.path.normpath(str(distribution.locate_file(file))))
            if not path.is_file() or SKIPPED.fullmatch(path.name):
                continue
            if not any(map(UNUSED.fullmatch, file.parts)):
                yield path
        for text in distribution.requires or ():
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                todo.append(requirement.name)


def _project() -> Iterator[Path]:
    for part in PARTS:
        path = PROJECT / part
        if path.is_file():
            yield path
        else:
            yield from _below(path)


def _libraries(programs: Iterable[Path]) -> set[Path]:
    """The shared libraries that the loader finds for `programs`, and the loader."""
    found = {LOADER, LIBGCC}
    for program in programs:
        command = [str(LOADER), "--list", str(program)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found.update(map(Path, re.findall(r"=> (/\S+) \(0x", done.stdout)))
    return found
