"""The systemd units: what systemd says of them, and the daemon within what they allow."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest
import trio

from tests.server.server_process import (
    COMMAND,
    PROJECT,
    SECONDS,
    client,
    environment,
    negotiate,
    served,
    short_folder,
)
from tests.server.unit_sandbox import allowed_calls, directives
from vfio_user_virtio.testing.guest_ram import GuestRam
from vfio_user_virtio.testing.net_driver import NetDriver
from vfio_user_virtio.testing.virtio_pci import VirtioPci
from vfio_user_virtio.transport.client import connect

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

UNITS: Final = PROJECT / "server" / "systemd"
SERVICE: Final = UNITS / "vfio-user-virtio@.service"
INSTALLED: Final = "/usr/bin/vfio-user-virtio"
SANDBOX: Final = (sys.executable, str(Path(__file__).with_name("unit_sandbox.py")), str(SERVICE))
MAX_EXPOSURE: Final = 1.0
"""What systemd 252 says of the service; more means that a directive was lost."""

pytestmark = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None or shutil.which("systemd-socket-activate") is None,
    reason="systemd-analyze and systemd-socket-activate (package systemd) are not there",
)


@pytest.fixture
def folder() -> Iterator[Path]:
    with short_folder() as path:
        yield path


@pytest.fixture
def installed(folder: Path) -> Path:
    """A folder with the units as if the command was where they expect it."""
    for unit in UNITS.glob("vfio-user-virtio*@.*"):
        text = unit.read_text()
        (folder / unit.name).write_text(text.replace(INSTALLED, "/bin/true"))
    return folder


def test_systemd_finds_no_fault(installed: Path) -> None:
    names = ("vfio-user-virtio@.socket", "vfio-user-virtio@.service")
    units = [str(installed / name) for name in (*names, "vfio-user-virtio-control@.socket")]
    result = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *units],
        capture_output=True,
        text=True,
        check=False,
        timeout=SECONDS,
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_systemd_would_find_a_fault(installed: Path) -> None:
    unit = installed / "vfio-user-virtio@.service"
    unit.write_text(unit.read_text().replace("ProtectHome=yes", "ProtectHome=perhaps"))
    result = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(unit)],
        capture_output=True,
        text=True,
        check=False,
        timeout=SECONDS,
    )
    assert "perhaps" in result.stderr


def test_the_service_is_hardly_exposed(installed: Path) -> None:
    result = subprocess.run(
        [
            "systemd-analyze",
            "security",
            "--offline=true",
            "--no-pager",
            str(installed / "vfio-user-virtio@.service"),
        ],
        capture_output=True,
        text=True,
        check=True,
        timeout=SECONDS,
    )
    overall = re.search(r"Overall exposure level for .*: ([0-9.]+)", result.stdout)
    assert overall is not None
    assert float(overall[1]) <= MAX_EXPOSURE


def test_the_user_can_be_made() -> None:
    result = subprocess.run(
        ["systemd-sysusers", "--dry-run", str(UNITS / "vfio-user-virtio.sysusers")],
        capture_output=True,
        text=True,
        check=True,
        timeout=SECONDS,
    )
    assert "Creating user 'vfio-user-virtio'" in result.stdout + result.stderr


@pytest.mark.parametrize("names", [(), ("vm1",), ("vm2", "vm1")])
def test_a_socket_unit_starts_the_daemon(folder: Path, names: tuple[str, ...]) -> None:
    """With the real systemd-socket-activate; several sockets go by their names."""
    paths = [folder / (name or "s") for name in names or ("",)]
    arguments = ["--fdname=" + ":".join(names)] if names else []
    options = []
    if names:
        config = folder / "c.toml"
        members = [f"[[owner.member]]\nname = 'to-{n}'\nfd_name = '{n}'" for n in sorted(names)]
        config.write_text("[[owner]]\n" + "\n".join(members))
        options = ["--config", str(config)]
    listens = [f"--listen={path}" for path in paths]
    process = subprocess.Popen(
        ["systemd-socket-activate", *listens, *arguments, *COMMAND, "serve", *options],
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stderr is not None
        for _ in paths:
            assert "Listening on" in process.stderr.readline()
        for path in paths:
            with client(path):
                pass
        process.terminate()
        _, log = process.communicate(timeout=SECONDS)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 0
    assert "Traceback" not in log
    for number, name in enumerate(names, 3):
        assert f"to-{name}: MAC address" in log
        assert re.search(f"to-{name}: .* by descriptor {number} .listening.", log)
    assert sorted(os.listdir(folder)) == sorted(
        [path.name for path in paths] + (["c.toml"] if names else [])
    ), "the sockets are the manager's"


def in_sandbox(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*SANDBOX, sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        timeout=SECONDS,
    )


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("import mmap; mmap.mmap(-1, 4096, prot=7)", "Permission denied"),
        ("import socket; socket.socket(socket.AF_INET)", "Operation not permitted"),
        ("import os; os.chroot('/')", "Operation not permitted"),
        ("import socket; socket.socket(socket.AF_UNIX)", None),
    ],
)
def test_the_sandbox_of_these_tests_is_one(code: str, error: str | None) -> None:
    result = in_sandbox(code)
    assert (result.returncode == 0) == (error is None)
    assert error is None or error in result.stderr


def test_the_filter_is_what_systemd_makes_of_it() -> None:
    calls = allowed_calls(directives(str(SERVICE)))
    assert {"io_submit", "eventfd2", "recvmsg", "writev", "ioctl", "execve"} <= calls
    assert not calls & {"mount", "ptrace", "bpf", "setpriority", "reboot", "chroot"}


def test_the_daemon_serves_within_the_sandbox(folder: Path) -> None:
    with served("--socket-path", folder / "s", prefix=SANDBOX) as server:
        with client(folder / "s"):
            pass
        exit_code, log = server.stop()
    assert exit_code == 0
    assert "Traceback" not in log


@contextlib.asynccontextmanager
async def driver(path: Path) -> AsyncIterator[NetDriver]:
    with GuestRam() as ram:
        async with connect(path, memory=ram) as guest:
            await ram.map(guest)
            made = NetDriver(await VirtioPci.open(guest), ram)
            await made.start()
            yield made


async def test_packets_flow_within_the_sandbox(folder: Path) -> None:
    """Two guests on one switch: rings, barriers and interrupts are all allowed."""
    config = folder / "c.toml"
    config.write_text(
        f"[[owner]]\n[[owner.member]]\nsocket_path = '{folder}/a'\nmac = '02:00:00:00:00:0a'\n"
        f"[[owner.member]]\nsocket_path = '{folder}/b'\nmac = '02:00:00:00:00:0b'\n"
    )
    there = bytes.fromhex("02000000000b02000000000a88b5") + b"there".ljust(50, b".")
    back = bytes.fromhex("02000000000a02000000000b88b5") + b"back".ljust(50, b".")
    with served("--config", config, prefix=SANDBOX) as server:
        with trio.fail_after(SECONDS):
            async with driver(folder / "a") as a, driver(folder / "b") as b:
                for _ in range(3):
                    await a.send(there)
                    assert (await b.receive()).data == there
                    await b.send(back)
                    assert (await a.receive()).data == back
        exit_code, log = server.stop()
    assert exit_code == 0
    assert "Traceback" not in log


def test_a_connected_socket_that_is_passed_within_the_sandbox() -> None:
    ours, theirs = socket.socketpair()
    number = theirs.fileno()
    with ours, theirs, served("--fd", str(number), pass_fds=[number], prefix=SANDBOX) as server:
        theirs.close()
        negotiate(ours)
        ours.close()
        assert server.end()[0] == 0
