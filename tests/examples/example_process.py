"""An example as its reader runs it: a process of its own, in a session of its own."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

PROJECT: Final = Path(__file__).resolve().parents[2]
EXAMPLES: Final = PROJECT / "examples"


def environment(folder: Path, **more: str) -> dict[str, str]:
    """As the Makefile sets it, with temporary files in `folder`."""
    return {**os.environ, "PYTHONPATH": "server:.", "TMPDIR": str(folder), **more}


def start_example(*argv: str, environ: Mapping[str, str]) -> subprocess.Popen[str]:
    """Python with `argv`; in a new session, so that all it starts is found."""
    return subprocess.Popen(
        [sys.executable, *argv],
        cwd=PROJECT,
        env=environ,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def shell_words(text: str) -> list[str]:
    """The words of a command that is broken into lines by backslashes."""
    return shlex.split(text.replace("\\\n", " "))


def processes_of(session: int) -> list[str]:
    """The command lines of the processes that are left of a session."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = stat.read_text()
            command = stat.with_name("cmdline").read_bytes()
        except OSError:  # it has just ended
            continue
        if int(text.rpartition(")")[2].split()[3]) == session:
            found.append(command.replace(b"\0", b" ").decode(errors="replace"))
    return found
