"""Fetches the test bed: `python3 -m tests.testbed.provision`.

Packages come from the mirror that the system's own apt uses, by apt itself with a root, lists and
a configuration of its own: the system's apt state is neither read nor changed, no root is needed,
and signatures are checked as apt always does, against Debian's archive keyring.  The system's
`Acquire` settings (proxies, retries) are carried over.  `apt-get install` into a chroot and
debootstrap were rejected: both need root and bring an init system that nothing here uses.

What apt resolves is every dependency of the programs, as on a system with no package at all, but
of the kernel only `linux-*` packages.  Standard library only: this runs before `.venv` exists.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tests.testbed import bed as beds
from tests.testbed.kernel import unpack_vmlinux

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

KEYRING: Final = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
ETC_APT: Final = Path("/etc/apt")


class ProvisionError(Exception):
    """The bed could not be made; the message says what failed and what to do."""


def say(text: str) -> None:
    print(f"test bed: {text}", flush=True)


def mirrors(sources: Path = ETC_APT) -> Iterator[str]:
    """The archive URIs that the system's apt uses, deb822 stanzas first, security ones left out."""
    for path in sorted((sources / "sources.list.d").glob("*.sources")):
        for stanza in re.split(r"\n\s*\n", path.read_text()):
            lines = [line for line in stanza.splitlines() if not line.startswith("#")]
            fields = {
                name.strip().lower(): value.split()
                for name, colon, value in (line.partition(":") for line in lines)
                if colon
            }
            if fields.get("enabled") == ["no"] or "deb" not in fields.get("types", []):
                continue
            yield from (uri for uri in fields.get("uris", []) if _is_debian(uri))
    for path in [sources / "sources.list", *sorted((sources / "sources.list.d").glob("*.list"))]:
        if path.is_file():
            for line in path.read_text().splitlines():
                match = re.match(r"deb\s+(?:\[[^]]*\]\s*)?(\S+)\s", line)
                if match and _is_debian(match[1]):
                    yield match[1]


def _is_debian(uri: str) -> bool:
    """By the archive's customary folder name; other vendors' archives have another."""
    return re.search(r"/debian(/|\.list|$)", uri) is not None and "security" not in uri


class Apt:
    """apt with everything but the keyring and the `Acquire` settings its own."""

    def __init__(self, root: Path, mirror: str, suites: Sequence[str] = beds.SUITES) -> None:
        for folder in ("state/lists/partial", "cache/archives/partial", "debs"):
            (root / folder).mkdir(parents=True)
        (root / "state/status").touch()
        (root / "sources.list").write_text(
            "".join(f"deb [signed-by={KEYRING}] {mirror} {suite} main\n" for suite in suites)
        )
        inherited = [
            line
            for line in run(["apt-config", "dump"]).splitlines()
            if line.startswith("Acquire::") and not line.startswith("Acquire::IndexTargets")
        ]
        settings = {
            "APT::Architecture": "amd64",
            "APT::Architectures": "amd64",
            "APT::Default-Release": suites[-1],
            "APT::Install-Recommends": "false",
            "APT::Sandbox::User": "",  # the cache lies in a home directory, closed to _apt
            "APT::Update::Error-Mode": "any",
            "Acquire::Languages": "none",
            "Dir::State": f"{root}/state",
            "Dir::State::status": f"{root}/state/status",
            "Dir::Cache": f"{root}/cache",
            "Dir::Etc::SourceList": f"{root}/sources.list",
            "Dir::Etc::SourceParts": "/dev/null",
            "Dir::Etc::Preferences": "/dev/null",
            "Dir::Etc::PreferencesParts": "/dev/null",
            "Dir::Etc::Main": "/dev/null",
            "Dir::Etc::Parts": "/dev/null",
        }
        config = root / "apt.conf"
        lines = [*inherited, *(f'{name} "{value}";' for name, value in settings.items())]
        config.write_text("\n".join(lines) + "\n")
        self.env = {**os.environ, "APT_CONFIG": str(config), "LC_ALL": "C"}
        self.debs = root / "debs"

    def __call__(self, *argv: str) -> str:
        return run(argv, env=self.env, cwd=self.debs)

    def closure(self, packages: Sequence[str]) -> dict[str, str]:
        """The versions of `packages` and all that they depend on."""
        plan = self("apt-get", "--simulate", "--quiet", "install", *packages)
        return dict(re.findall(r"^Inst (\S+) \((\S+)", plan, re.MULTILINE))

    def kernel(self, package: str) -> dict[str, str]:
        """The versions of a kernel's own packages: those that it wants in exactly one version."""
        found: dict[str, str] = {}
        todo = [package]
        while todo:
            name = todo.pop()
            shown = self("apt-cache", "show", "--no-all-versions", name)
            fields = dict(re.findall(r"^(Version|Depends): (.*)$", shown, re.MULTILINE))
            found[name] = fields["Version"]
            depends = re.findall(r"(linux-\S+) \(= ", fields.get("Depends", ""))
            todo += [other for other in depends if other not in found]
        return found


def run(argv: Sequence[str], *, env: dict[str, str] | None = None, cwd: Path | None = None) -> str:
    """Standard output of a command; raises `ProvisionError` with what it printed if it fails."""
    try:
        done = subprocess.run(argv, env=env, cwd=cwd, check=False, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise ProvisionError(f"{argv[0]} is not there; the test bed needs Debian's apt") from error
    if done.returncode:
        raise ProvisionError(
            f"`{' '.join(argv[:4])} …` failed with {done.returncode}:\n{done.stderr.strip()}"
        )
    return done.stdout


def find_mirror() -> str:
    """The mirror that packages come from; raises `ProvisionError`."""
    if not KEYRING.is_file():
        raise ProvisionError(f"{KEYRING} is missing; install debian-archive-keyring")
    mirror = next(mirrors(), None)
    if mirror is None:
        raise ProvisionError(f"no Debian mirror in the apt sources under {ETC_APT}")
    return mirror


def build(root: Path) -> None:
    """Makes the whole bed in the empty folder `root`."""
    apt = Apt(root / "apt", find_mirror())
    say(f"reading the package lists of {' and '.join(beds.SUITES)} from the system's mirror")
    apt("apt-get", "--quiet", "update")
    packages = {**apt.closure(beds.PROGRAMS), **apt.kernel(beds.KERNEL)}
    say(f"downloading {len(packages)} packages")
    apt("apt-get", "--quiet", "download", *(f"{name}={packages[name]}" for name in packages))
    say("unpacking")
    made = beds.Bed(root)
    made.sys.mkdir()
    for deb in sorted(apt.debs.glob("*.deb")):
        run(["dpkg-deb", "--extract", str(deb), str(made.sys)])
    shutil.rmtree(root / "apt")
    for folder in ("usr/share/doc", "usr/share/man", "usr/share/locale"):
        shutil.rmtree(made.sys / folder, ignore_errors=True)
    made.write_commands()
    say("unpacking the kernel image, so that the guest need not")
    found = [*made.sys.glob("usr/lib/modules/*/vmlinuz"), *made.sys.glob("boot/vmlinuz-*")]
    if len(found) != 1:
        raise ProvisionError(f"{beds.KERNEL} brought {len(found)} kernel images, expected one")
    found[0].rename(made.bzimage)
    made.vmlinux.write_bytes(unpack_vmlinux(made.bzimage.read_bytes(), made.command("zstd")))
    made.manifest.write_text(json.dumps({"packages": packages}, indent=1, sort_keys=True) + "\n")


def provision() -> beds.Bed:
    """The bed of the cache, made first if it is not there.

    Raises `ProvisionError`.  A bed appears under its name only when it is whole; a second process
    that wants it at the same time waits for the first.
    """
    with contextlib.suppress(beds.TestbedMissing):
        return beds.Bed.find()
    cache = beds.cache_root()
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "testbed.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with contextlib.suppress(beds.TestbedMissing):
            return beds.Bed.find()
        partial = cache / "testbed.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        build(partial)
        partial.rename(cache / f"testbed-{beds.key()}")
    return beds.Bed.find()


def main() -> int:
    try:
        made = provision()
    except ProvisionError as error:
        say(f"error: {error}")
        return 1
    say(made.describe())
    return 0


if __name__ == "__main__":
    sys.exit(main())
