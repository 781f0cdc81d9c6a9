"""Makes the project's virtual environment: `python3 -m tests.testbed.environment`.

`.venv` gets the project in editable form, its dependencies and its `dev` group.  The wheels are
kept in the cache under a name that follows from what `pyproject.toml` asks for, so that a new
clone is set up without the network.  The group is read here because the pip of Debian 12 has no
`--group`, and pip is not upgraded because nothing else needs it.  Standard library only.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tests.testbed.bed import cache_root

if TYPE_CHECKING:
    from collections.abc import Sequence

PROJECT: Final = Path(__file__).resolve().parents[2]
VENV: Final = PROJECT / ".venv"
PYTHON: Final = VENV / "bin/python"
STAMP: Final = VENV / "requirements.json"


def say(text: str) -> None:
    print(f"environment: {text}", flush=True)


def requirements() -> list[str]:
    """What the project needs to run, to be tested and to be built."""
    with (PROJECT / "pyproject.toml").open("rb") as file:
        pyproject = tomllib.load(file)
    wanted: list[str] = [
        *pyproject["build-system"]["requires"],
        *pyproject["project"]["dependencies"],
        *pyproject["dependency-groups"]["dev"],
    ]
    return wanted


def pip(*argv: str) -> None:
    command = [str(PYTHON), "-m", "pip", "--quiet", "--disable-pip-version-check", *argv]
    subprocess.run(command, check=True, cwd=PROJECT)


def fetch_wheels(wanted: Sequence[str]) -> Path:
    """The folder of the cache that holds the wheels of `wanted`, filled first if need be."""
    name = json.dumps([sys.version_info[:2], wanted])
    wheels = cache_root() / f"wheels-{hashlib.sha256(name.encode()).hexdigest()[:12]}"
    if not wheels.is_dir():
        say("fetching the wheels of the dependencies")
        partial = wheels.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        pip("wheel", "--wheel-dir", str(partial), *wanted)
        partial.rename(wheels)
    return wheels


def main() -> int:
    wanted = requirements()
    stamp = json.dumps([str(PROJECT), wanted], indent=1)
    if STAMP.is_file() and STAMP.read_text() == stamp:
        say(f"{VENV} is as it should be")
        return 0
    say(f"making {VENV}")
    try:
        subprocess.run([sys.executable, "-m", "venv", str(VENV)], check=True)
        wheels = fetch_wheels(wanted)
        say(f"installing from {wheels}")
        local = ("install", "--no-index", "--find-links", str(wheels))
        pip(*local, *wanted)
        pip(*local, "--no-build-isolation", "--no-deps", "--editable", str(PROJECT))
    except subprocess.CalledProcessError as error:
        say(f"error: `{' '.join(error.cmd[:4])} …` failed with {error.returncode}")
        return 1
    STAMP.write_text(stamp)
    return 0


if __name__ == "__main__":
    sys.exit(main())
