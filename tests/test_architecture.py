"""The shape of the project, as tests: what imports what, what a wheel holds, how long files are."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

PROJECT: Final = Path(__file__).resolve().parents[1]
PACKAGES: Final = {
    "vfio_user_virtio": PROJECT / "vfio_user_virtio",
    "vfio_user_virtio_server": PROJECT / "server/vfio_user_virtio_server",
}
SANS_IO: Final = (
    "protocol",
    "pci",
    "virtio",
    "migration.states",
    "migration.stream",
    "migration.stream_facts",
    "migration.private_record",
    "migration.precopy",
    "migration.preflight",
    "migration.transfer_frames",
    "migration.transfer_stream",
    "memory.bitmap",
    "memory.dirty_log",
    "control.varlink",
    "control.idl",
    "control.interface",
    "control.records",
)
"""Packages and modules that know no sockets, files, event loop or clock."""
IO_MODULES: Final = ("asyncio", "fcntl", "mmap", "select", "selectors", "socket", "trio")
MAX_LINES: Final = 500
UNWRITTEN: Final = re.compile(r"(?!\.ci$)\..*|.*\.egg-info|__pycache__|build|dist")
"""Folders whose files nobody wrote here."""

SEAMS: Final = frozenset({"device", "errors", "limits"})
LIBRARY: Final = SEAMS | {
    "protocol",
    "pci",
    "virtio",
    "memory",
    "migration",
    "transport",
    "control",
}
ARROWS: Final[dict[str, frozenset[str]]] = {
    "errors": frozenset(),
    "limits": frozenset(),
    "device": frozenset({"errors", "limits"}),
    "eventfd": frozenset({"errors"}),
    "protocol": SEAMS,
    "pci": SEAMS,
    "virtio": SEAMS | {"pci"},
    "memory": SEAMS,
    "migration": SEAMS | {"protocol", "virtio"},
    "transport": SEAMS | {"eventfd", "protocol", "memory"},
    "backends": SEAMS | {"eventfd", "pci", "virtio", "memory", "migration"},
    "control": SEAMS | {"protocol", "memory", "migration", "transport"},
    "libvfio_user": SEAMS | {"eventfd", "protocol", "memory", "transport"},
    "testing": LIBRARY | {"backends", "libvfio_user"},
}
"""What each part of the library may import beside itself: backends know nothing of the wire,
sessions know nothing of virtio."""


def module_files() -> Iterator[tuple[str, Path]]:
    """Each module of the wheel, by its dotted name."""
    for package, folder in PACKAGES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            yield ".".join((package, *(part for part in parts if part != "__init__"))), path


MODULES: Final = dict(module_files())
NAMED: Final = [pytest.param(name, path, id=name) for name, path in MODULES.items()]


def imports(name: str, path: Path) -> set[str]:
    """The dotted names that a module imports, `from a import b` as `a.b`, types included."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} imports relatively; imports here are absolute"
            assert node.module is not None
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


@pytest.mark.parametrize(("name", "path"), NAMED)
def test_arrows_point_one_way(name: str, path: Path) -> None:
    parts = name.split(".")
    for other in imports(name, path):
        top, _, rest = other.partition(".")
        if top == "vfio_user_virtio_server":
            assert parts[0] == top, f"{name} imports the server: {other}"
        elif top == "vfio_user_virtio" and parts[0] == top and len(parts) > 1:
            part = rest.partition(".")[0]
            allowed = ARROWS[parts[1]] | {parts[1]}
            assert part in allowed, f"{name} imports {other}; it may import {sorted(allowed)}"


def test_library_parts_are_all_in_the_table() -> None:
    parts = {name.split(".")[1] for name in MODULES if name.startswith("vfio_user_virtio.")}
    assert parts <= ARROWS.keys()


SANS_IO_MODULES: Final = [
    name
    for name in MODULES
    if f"{name}.".startswith(tuple(f"vfio_user_virtio.{part}." for part in SANS_IO))
]


@pytest.mark.parametrize("name", SANS_IO_MODULES)
def test_sans_io_sources_name_no_io(name: str) -> None:
    tops = {other.partition(".")[0] for other in imports(name, MODULES[name])}
    assert tops.isdisjoint(IO_MODULES)


def test_sans_io_packages_import_without_io() -> None:
    """In a process where the I/O modules cannot be imported, every sans-I/O module can."""
    assert len(SANS_IO_MODULES) > len(SANS_IO)
    script = (
        "import importlib, sys\n"
        f"sys.modules.update(dict.fromkeys({IO_MODULES!r}))\n"
        f"for name in {SANS_IO_MODULES!r}: importlib.import_module(name)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=PROJECT, check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_wheel_holds_the_two_packages_and_nothing_else(tmp_path: Path) -> None:
    source = tmp_path / "source"
    skip = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for folder in ("vfio_user_virtio", "server"):
        shutil.copytree(PROJECT / folder, source / folder, ignore=skip)
    for pattern in ("pyproject.toml", "LICENSE", "README.md"):
        for path in PROJECT.glob(pattern):
            shutil.copy(path, source)
    script = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], cwd=source, check=True, capture_output=True
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert {name.partition("/")[0] for name in names} == set(PACKAGES)
    for package, home in PACKAGES.items():
        files = [*home.rglob("*.py"), home / "py.typed"]
        assert {f"{package}/{path.relative_to(home)}" for path in files} <= names


def project_files() -> Iterator[Path]:
    """Every text file that a person wrote here."""
    for top, folders, files in os.walk(PROJECT):
        folders[:] = [name for name in folders if not UNWRITTEN.fullmatch(name)]
        for name in files:
            path = Path(top, name)
            if not path.is_symlink() and b"\0" not in path.read_bytes()[:1024]:
                yield path


def test_modules_are_short() -> None:
    lengths = {
        str(path.relative_to(PROJECT)): len(path.read_text().splitlines())
        for path in project_files()
        if path.suffix == ".py"
    }
    assert {name: lines for name, lines in lengths.items() if lines > MAX_LINES} == {}


def test_modules_say_why_they_exist() -> None:
    silent = [
        name for name, path in MODULES.items() if not ast.get_docstring(ast.parse(path.read_text()))
    ]
    assert silent == []


def test_no_path_of_a_developer_machine() -> None:
    private = re.compile(r"(?<![\w.~}])/(?:home|root|work|Users)/\w")
    found = [
        f"{path.relative_to(PROJECT)}:{number}: {line.strip()}"
        for path in project_files()
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1)
        if private.search(line)
    ]
    assert found == []
