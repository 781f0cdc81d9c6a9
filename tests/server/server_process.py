"""The daemon as a process of its own, started and waited for as a service manager would.

It is ready when it says READY=1, so nothing here sleeps or polls.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final

import attrs

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

PROJECT: Final = Path(__file__).parents[2]
COMMAND: Final = (sys.executable, "-m", "vfio_user_virtio_server")
SECONDS: Final = 30.0
"""How long anything may take before a test fails rather than hangs."""

_CAPABILITIES: Final = b'{"capabilities":{}}\0'
VERSION: Final = struct.pack("<HHIIIHH", 1, 1, 20 + len(_CAPABILITIES), 0, 0, 0, 0) + _CAPABILITIES
"""VERSION 0.0 as message 1, with all capabilities at their defaults."""


def environment() -> dict[str, str]:
    """In which the daemon finds its packages, no service manager, and no width but a terminal's."""
    left_out = {"NOTIFY_SOCKET", "COLUMNS", "LINES"}
    inherited = {key: value for key, value in os.environ.items() if key not in left_out}
    return inherited | {"PYTHONPATH": f"{PROJECT}:{PROJECT / 'server'}"}


def run(
    *arguments: str | os.PathLike[str],
    pass_fds: Sequence[int] = (),
    prefix: Sequence[str] = (),
    stdout: int = subprocess.PIPE,
) -> subprocess.CompletedProcess[str]:
    """Run the command to its end."""
    return subprocess.run(
        [*prefix, *COMMAND, *(os.fspath(argument) for argument in arguments)],
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        timeout=SECONDS,
        check=False,
        pass_fds=pass_fds,
        env=environment(),
    )


@attrs.frozen
class Server:
    """A daemon that said that it was ready; `messages` are those that came before."""

    process: subprocess.Popen[str]
    manager: socket.socket
    messages: list[str]

    def next_message(self) -> str:
        """What the daemon tells the service manager next."""
        return _heard(self.manager, self.process)

    def stop(self, number: signal.Signals = signal.SIGTERM) -> tuple[int, str]:
        """Send a signal; the exit code, and what was logged."""
        self.process.send_signal(number)
        return self.end()

    def end(self) -> tuple[int, str]:
        """Wait for the end; the exit code, and what was logged."""
        _, log = self.process.communicate(timeout=SECONDS)
        return self.process.returncode, log


@contextlib.contextmanager
def served(
    *arguments: str | os.PathLike[str],
    pass_fds: Sequence[int] = (),
    prefix: Sequence[str] = (),
) -> Iterator[Server]:
    """``serve`` with arguments, ready; killed in the end unless it ended by itself."""
    with short_folder() as folder, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(f"{folder}/notify")
        manager.settimeout(SECONDS)
        process = subprocess.Popen(
            [*prefix, *COMMAND, "serve", *(os.fspath(argument) for argument in arguments)],
            env=environment() | {"NOTIFY_SOCKET": f"{folder}/notify"},
            pass_fds=pass_fds,
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            messages: list[str] = []
            while "READY=1" not in messages:
                messages.append(_heard(manager, process))
            yield Server(process, manager, messages)
        finally:
            process.kill()
            process.communicate()


def _heard(manager: socket.socket, process: subprocess.Popen[str]) -> str:
    """The next message to the service manager; AssertionError if the process ends first."""
    ended = os.pidfd_open(process.pid)
    try:
        readable, _, _ = select.select([manager.fileno(), ended], [], [], SECONDS)
    finally:
        os.close(ended)
    if manager.fileno() in readable:
        return manager.recv(4096).decode()
    assert readable, "the daemon says nothing"
    _, log = process.communicate(timeout=SECONDS)
    raise AssertionError(f"the daemon ended with {process.returncode}: {log}")


@contextlib.contextmanager
def short_folder() -> Iterator[Path]:
    """A folder with a short name, since a socket's path has at most 107 bytes."""
    folder = tempfile.mkdtemp(prefix="vu-")
    try:
        yield Path(folder)
    finally:
        shutil.rmtree(folder)


def negotiate(sock: socket.socket) -> bytes:
    """Say VERSION on a connected socket; the 16 bytes of the reply's header."""
    sock.settimeout(SECONDS)
    sock.sendall(VERSION)
    header = sock.recv(16, socket.MSG_WAITALL)
    assert header[:4] == VERSION[:4]
    assert header[8] == 1, "not a reply"
    sock.recv(int.from_bytes(header[4:8], "little") - 16, socket.MSG_WAITALL)
    return header


@contextlib.contextmanager
def client(path: str | os.PathLike[str]) -> Iterator[socket.socket]:
    """A client that has negotiated."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(os.fspath(path))
        negotiate(sock)
        yield sock


@contextlib.contextmanager
def unprivileged() -> Iterator[None]:
    """Without root's power over permissions; the same test holds for root and for others."""
    import grp  # before the interpreter's own folder may be out of reach
    import pwd

    del grp, pwd
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65_534)
    try:
        yield
    finally:
        os.seteuid(0)
