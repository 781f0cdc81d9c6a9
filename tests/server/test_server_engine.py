"""serve --engine: what is said when libvfio-user is not there, and what is served when it is."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import struct
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from tests.server.server_process import SECONDS, client, negotiate, run, served, short_folder

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vfio_user_virtio.libvfio_user import Library

ENGINE: Final = ("--engine", "libvfio-user")
WITHOUT_WX: Final = (
    sys.executable,
    "-c",
    "import ctypes, os, sys\n"
    "assert ctypes.CDLL(None).prctl(65, 1, 0, 0, 0) == 0  # PR_SET_MDWE, and children have it too\n"
    "os.execv(sys.argv[1], sys.argv[1:])",
)


def answers(sock: socket.socket) -> bool:
    """Whether DEVICE_RESET is answered, to who has negotiated."""
    sock.sendall(struct.pack("<HHIII", 2, 13, 16, 0, 0))
    header = sock.recv(16, socket.MSG_WAITALL)
    return struct.unpack("<HHIII", header) == (2, 13, 16, 1, 0)


@pytest.fixture
def folder() -> Iterator[Path]:
    with short_folder() as path:
        yield path


def test_a_library_that_is_not_there_is_told_before_anything_is_served(folder: Path) -> None:
    result = run("serve", *ENGINE, "--libvfio-user", "/nowhere.so", "--socket-path", folder / "s")
    assert result.returncode == os.EX_UNAVAILABLE
    assert "--libvfio-user: cannot load library '/nowhere.so'" in result.stderr
    assert "install libvfio-user" in result.stderr
    assert os.listdir(folder) == []


def test_a_library_for_the_native_engine_is_a_mistake(folder: Path) -> None:
    result = run("serve", "--libvfio-user", "/nowhere.so", "--socket-path", folder / "s")
    assert result.returncode == os.EX_USAGE
    assert "--libvfio-user is for --engine libvfio-user; add that" in result.stderr


def test_clients_come_one_after_the_other_and_see_the_same_device(
    folder: Path, library: Library
) -> None:
    facts = []
    for engine in ((), (*ENGINE, "--libvfio-user", library.path)):
        options = ("--socket-path", folder / "s", "--mac", "52:54:00:12:34:56", *engine)
        with served(*options) as server:
            for _ in range(2):
                result = run("probe", "--socket-path", folder / "s", "--json")
                assert (result.returncode, result.stderr) == (0, "")
            exit_code, log = server.stop()
        assert exit_code == 0
        facts.append(json.loads(result.stdout))
        assert ("engine: libvfio-user" in log) == bool(engine)
    native, other = facts
    for part in ("regions", "pci", "virtio", "net"):
        assert native[part] == other[part], part


def test_a_passed_socket_and_a_connected_one(folder: Path, library: Library) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "s"))
        listener.listen()
        fd = listener.fileno()
        with served("--fd", str(fd), *ENGINE, pass_fds=[fd]) as server:
            with client(folder / "s") as sock:
                assert answers(sock)
            assert server.stop()[0] == 0
    ours, theirs = socket.socketpair()
    with (
        ours,
        theirs,
        served("--fd", str(theirs.fileno()), *ENGINE, pass_fds=[theirs.fileno()]) as one,
    ):
        theirs.close()
        negotiate(ours)
        assert answers(ours)
        ours.close()
        assert one.end()[0] == 0


def test_it_ends_in_time_while_a_client_is_silent_or_does_not_read(
    folder: Path, library: Library
) -> None:
    with served("--socket-path", folder / "s", *ENGINE) as server, client(folder / "s"):
        assert server.stop()[0] == 0
    with served("--socket-path", folder / "s", *ENGINE) as server, client(folder / "s") as sock:
        assert answers(sock)
        sock.setblocking(False)
        read = struct.pack("<HHIIIQII", 1, 9, 32, 0, 0, 0, 7, 256)  # configuration space
        with contextlib.suppress(BlockingIOError):
            while True:  # and never an answer read
                sock.send(read)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(SECONDS) == 0


def test_it_runs_without_writable_executable_memory(folder: Path, library: Library) -> None:
    with served("--socket-path", folder / "s", *ENGINE, prefix=WITHOUT_WX) as server:
        with client(folder / "s") as sock:
            assert answers(sock)
        maps = Path(f"/proc/{server.process.pid}/maps").read_text().splitlines()
        assert not [line for line in maps if " rwx" in line or " -wx" in line]
        assert server.stop()[0] == 0


@pytest.mark.parametrize(("source", "target"), [(ENGINE, ()), ((), ENGINE), (ENGINE, ENGINE)])
def test_a_device_moves_between_engines(
    folder: Path, library: Library, source: tuple[str, ...], target: tuple[str, ...]
) -> None:
    here_at, there_at = folder / "one", folder / "two"
    with (
        served("--socket-path", here_at, "--mac", "52:54:00:00:00:01", *source) as here,
        served("--socket-path", there_at, "--mac", "52:54:00:00:00:02", *target) as there,
    ):
        result = run("migrate", "--from-socket", here_at, "--to-socket", there_at)
        assert (result.returncode, result.stderr) == (0, "")
        for server in (here, there):
            assert server.stop()[0] == 0
