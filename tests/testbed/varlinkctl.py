"""Fetches varlinkctl: `python3 -m tests.testbed.varlinkctl`.

The control interface is to work with the program that administrators have, which comes with systemd
255 and newer.  Where the system's is older, Debian's newer package is unpacked beside the test bed,
with the libraries that it wants, and run by their own loader; nothing is installed.  It is apart
from the bed, which it would otherwise make anew.  Standard library only.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import shutil
import sys
from typing import TYPE_CHECKING, Final

from tests.testbed import bed as beds
from tests.testbed.provision import Apt, ProvisionError, find_mirror, run

if TYPE_CHECKING:
    from pathlib import Path

FORMAT: Final = 1
"""Counts up when what this file makes changes."""

SUITE: Final = beds.SUITES[0]
NAME: Final = "varlinkctl"
PACKAGE: Final = "systemd"
LIBRARIES: Final = "usr/lib/x86_64-linux-gnu"
LOADER: Final = "usr/lib64/ld-linux-x86-64.so.2"


class VarlinkctlMissing(Exception):
    """It is not there; the message says how to get it."""


def folder() -> Path:
    recipe = json.dumps([FORMAT, SUITE, PACKAGE])
    return beds.cache_root() / f"varlinkctl-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}"


def find() -> list[str]:
    """The command line of varlinkctl, without arguments; raises `VarlinkctlMissing`."""
    if (installed := shutil.which(NAME)) is not None:
        return [installed]
    root = folder()
    if not root.is_dir():
        raise VarlinkctlMissing(f"no varlinkctl in {root}; `make setup` provides it")
    return _command(root)


def _command(root: Path) -> list[str]:
    libraries = f"{root / LIBRARIES}:{root / LIBRARIES / 'systemd'}"
    return [str(root / LOADER), "--library-path", libraries, str(root / "usr/bin" / NAME)]


def build(root: Path) -> None:
    """Unpacks the program and its libraries in the empty folder `root`."""
    apt = Apt(root / "apt", find_mirror(), (SUITE,))
    apt("apt-get", "--quiet", "update")
    packages = apt.closure([PACKAGE])
    wanted = [name for name in packages if name == PACKAGE or name.startswith(("lib", "zlib"))]
    apt("apt-get", "--quiet", "download", *(f"{name}={packages[name]}" for name in wanted))
    everything = root / "everything"
    for deb in sorted(apt.debs.glob("*.deb")):
        run(["dpkg-deb", "--extract", str(deb), str(everything)])
    for part in (f"usr/bin/{NAME}", LOADER, LIBRARIES):
        (root / part).parent.mkdir(parents=True, exist_ok=True)
        shutil.move(everything / part, root / part)
    shutil.rmtree(everything)
    shutil.rmtree(root / "apt")


def provision() -> list[str]:
    """The command line, fetched first if need be.  Raises `ProvisionError`."""
    with contextlib.suppress(VarlinkctlMissing):
        return find()
    cache = beds.cache_root()
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "varlinkctl.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with contextlib.suppress(VarlinkctlMissing):
            return find()
        partial = cache / "varlinkctl.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        build(partial)
        partial.rename(folder())
    return find()


def main() -> int:
    try:
        command = provision()
        version = run([*command, "--version"]).splitlines()[0]
    except ProvisionError as error:
        print(f"varlinkctl: error: {error}", flush=True)
        return 1
    print(f"varlinkctl: {version}, at {command[-1]}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
