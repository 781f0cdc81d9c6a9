"""The control interface of the daemon, and what is made of it: `status` and `top`."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import shutil
import signal
import stat
import struct
import subprocess
import termios
import tomllib
from typing import TYPE_CHECKING

import pytest
import trio

from tests.server.server_process import (
    COMMAND,
    PROJECT,
    SECONDS,
    client,
    environment,
    run,
    served,
    short_folder,
)
from vfio_user_virtio.control.client import connect_control
from vfio_user_virtio.control.records import Device, Memory, Migration, Session
from vfio_user_virtio.errors import ConfigError, ConnectionLost, HostError
from vfio_user_virtio_server import config, serve, status, top
from vfio_user_virtio_server.config import InheritedSocket, SocketFd, SocketPath, parse_control
from vfio_user_virtio_server.main import _parser
from vfio_user_virtio_server.status import Seen

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from vfio_user_virtio_server.config import SocketConfig


@pytest.fixture
def folder() -> Iterator[Path]:
    with short_folder() as path:
        yield path


def control_of(*arguments: str) -> SocketConfig | None:
    options = _parser(["serve"]).parse_args(["serve", *arguments])
    return serve.configuration_of(options).control


# --- configuration ------------------------------------------------------------------------------


def test_options() -> None:
    device = ("--socket-path", "/s", "--mac", "02:00:00:00:00:01")
    assert control_of(*device) is None
    path = ("--control-path", "/c")
    assert control_of(*device, *path) == SocketPath("/c", 0o600)
    assert control_of(*device, *path, "--control-mode", "0660") == SocketPath("/c", 0o660)
    assert control_of(*device, *path, "--control-group", "kvm") == SocketPath("/c", 0o660, "kvm")
    for option in ("--control-mode=0600", "--control-group=kvm"):
        with pytest.raises(HostError, match="add --control-path"):
            control_of(*device, option)
    with pytest.raises(HostError, match="--control-path does not go with --config"):
        control_of("--config", "x", *path)
    with pytest.raises(ConfigError, match=r"path /s is used by member .* and by the control"):
        control_of(*device, "--control-path", "/s")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", None),
        ("[control]", InheritedSocket("control")),
        ("[control]\nfd_name = 'x'", InheritedSocket("x")),
        ("[control]\nfd = 5", SocketFd(5)),
        ("[control]\nsocket_path = '/c'", SocketPath("/c", 0o600)),
        ("[control]\nsocket_path = '/c'\nsocket_mode = '0666'", SocketPath("/c", 0o666)),
        ("[control]\nsocket_path = '/c'\nsocket_group = 'g'", SocketPath("/c", 0o660, "g")),
    ],
)
def test_a_table_of_the_file(text: str, expected: SocketConfig | None) -> None:
    assert parse_control(tomllib.loads(text), "f.toml") == expected


def test_a_table_that_is_wrong() -> None:
    with pytest.raises(ConfigError, match="control: unknown key 'path'"):
        parse_control({"control": {"path": "/c"}}, "f.toml")


def test_a_file_with_a_path_twice(folder: Path) -> None:
    file = folder / "c.toml"
    file.write_text("[control]\nsocket_path = '/x'\n[[owner]]\n[[owner.member]]\nfd_name = 'a'\n")
    found = config.read_file(str(file), seed=b"")
    assert found.control == SocketPath("/x", 0o600)
    file.write_text(file.read_text().replace("fd_name = 'a'", "socket_path = '/x'"))
    with pytest.raises(ConfigError, match="the control interface"):
        config.read_file(str(file), seed=b"")


# --- the daemon ---------------------------------------------------------------------------------


async def test_the_daemon_and_its_clients(folder: Path) -> None:
    path = folder / "c"
    with served("--socket-path", folder / "s", "--control-path", path) as server:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        async with connect_control(str(path)) as control:
            (device,) = await control.devices()
            assert device.kind == "software"
            assert device.identity.startswith("MAC address ")
            assert device.session is None
            with client(folder / "s"):
                (device,) = await control.devices()
                assert device.session is not None
                assert device.session.process == os.getpid()
            code, log = server.stop()
            assert code == 0, log
            with pytest.raises(ConnectionLost):
                await control.devices()
    assert not path.exists()


def test_the_daemon_ends_with_its_last_client_whoever_looks_on(folder: Path) -> None:
    path = folder / "c"
    with served("--socket-path", folder / "s", "--control-path", path, "--one-off") as server:

        async def look() -> None:
            async with connect_control(str(path)) as control:
                await control.devices()
                with client(folder / "s"):
                    await control.devices()
                code, log = await trio.to_thread.run_sync(server.end)
                assert code == 0, log

        trio.run(look)


async def test_owners_and_members_beside_a_pf(folder: Path) -> None:
    file = folder / "c.toml"
    file.write_text(
        f"[control]\nsocket_path = '{folder}/c'\n"
        f"[[owner]]\n[owner.pf]\nsocket_path = '{folder}/pf'\n"
        f"[[owner.member]]\nname = 'vm'\nsocket_path = '{folder}/s'\n"
        f"[[owner]]\n[[owner.member]]\nname = 'old'\nlegacy = true\nsocket_path = '{folder}/o'\n"
    )
    with served("--config", file):
        async with connect_control(f"{folder}/c") as control:
            member, pf, old = await control.devices()
            assert (member.name, pf.kind) == ("vm", "owner")
            assert "migration" not in member.abilities
            assert pf.abilities == []
            assert len(await control.statistics()) == 3
            assert old.abilities == [
                "migration",
                "dirty_log",
                "dirty_pages",
                "memory",
                "replay",
                "announce",
            ]
            await control.quiesce("old")


@pytest.mark.skipif(
    shutil.which("systemd-socket-activate") is None, reason="systemd-socket-activate is not there"
)
async def test_a_passed_socket_with_its_name(folder: Path) -> None:
    process = subprocess.Popen(  # noqa: ASYNC220 - it is there at once
        [
            "systemd-socket-activate",
            *(f"--listen={folder / name}" for name in ("s", "c")),
            "--fdname=vfio-user:control",
            *COMMAND,
            "serve",
        ],
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stderr is not None
        for _ in "sc":
            assert "Listening on" in process.stderr.readline()
        async with connect_control(str(folder / "c")) as control:
            (device,) = await control.devices()
            assert device.session is None
        process.terminate()
        _, log = await trio.to_thread.run_sync(process.communicate, None, SECONDS)
        assert "control: clients come by descriptor 4" in log
        assert process.returncode == 0
    finally:
        process.kill()
        process.communicate()


def test_a_named_socket_that_was_not_passed(folder: Path) -> None:
    file = folder / "c.toml"
    file.write_text(f"[control]\n[[owner]]\n[[owner.member]]\nsocket_path = '{folder}/s'\n")
    result = run("serve", "--config", file)
    assert result.returncode == os.EX_CONFIG
    assert "the control interface wants the passed socket 'control'" in result.stderr


# --- status -------------------------------------------------------------------------------------

DEVICE = Device(
    name="vm1",
    kind="software",
    identity="MAC address 02:00:00:00:00:01",
    abilities=["migration"],
    session=Session(connected=1000.0, process=42, version="0.0"),
    migration=Migration(
        state="STOP_COPY",
        options=[],
        holder="control",
        to_read=0,
        read=2000,
        loaded=300,
        images=1,
        half_loaded=False,
    ),
    memory=Memory(3, 3 << 30, 4096),
    dirty_log="client",
)


def seen(frames: int, at: float, device: Device = DEVICE) -> Seen:
    counters = {
        "port": {"frames_in": frames, "bytes_in": 1000 * frames, "frames_out": 0, "bytes_out": 0},
        "port_drops": {"runt": 0, "no_room": 7},
    }
    return Seen(device, counters, at)


def test_lines_of_status() -> None:
    assert list(status.lines([seen(5, 0.0)], 1000.0 + 3 * 86400 + 7200 + 61)) == [
        "vm1: software, MAC address 02:00:00:00:00:01",
        "    Client: process 42, vfio-user 0.0, for 3 d 2 h",
        "    Guest memory: 3 GiB in 3 mappings, 4 KiB by messages",
        "    Migration: STOP_COPY by control, 1.95 KiB read, 0 to read, 300 loaded",
        "    Dirty log: by client",
        "    port: frames_in 5, bytes_in 5000",
        "    port_drops: no_room 7",
    ]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-1, "0 s"), (0, "0 s"), (59.9, "59 s"), (60, "1 min"), (3661, "1 h 1 min"), (86400, "1 d")],
)
def test_durations(seconds: float, text: str) -> None:
    assert status.duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0"),
        (1023, "1023"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (200 << 20, "200 MiB"),
        (5 << 50, "5120 TiB"),
    ],
)
def test_sizes(count: int, text: str) -> None:
    assert status.size(count) == text


def test_status_as_json_and_for_people(folder: Path) -> None:
    with served("--socket-path", folder / "s", "--control-path", folder / "c"):
        result = run("status", "--control-path", folder / "c", "--json")
        (device,) = json.loads(result.stdout)["devices"]
        assert device["migration"]["state"] == "RUNNING"
        assert device["counters"]["port"]["frames_in"] == 0
        with client(folder / "s"):
            result = run("status", "--control-path", folder / "c")
        assert result.stdout.startswith("device: software, MAC address ")
        assert f"process {os.getpid()}, vfio-user 0.0" in result.stdout
        # a device's socket is no control interface, and says nothing to it
        result = run("status", "--control-path", folder / "s")
        assert result.returncode != 0
        assert "Traceback" not in result.stderr
    result = run("status", "--control-path", folder / "c")
    assert result.returncode == os.EX_UNAVAILABLE


# --- top ----------------------------------------------------------------------------------------


WIDTH = 60


def test_a_picture() -> None:
    title, _, head, line = top.picture("/c", [seen(0, 1.0)], [seen(3000, 3.0)])
    assert title.startswith("/c  ")
    columns = dict(zip(head.split(), line.split(), strict=False))
    assert columns["DEVICE"] == "vm1"
    assert line.split() == ["vm1", "42", "STOP_COPY", "0", "0", "1.5k", "12M", "0", "7"]
    assert len(line) <= 100


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (999, "999"), (999.9, "1k"), (1500, "1.5k"), (2.34e7, "23.4M"), (1e10, "10G")],
)
def test_short_numbers(number: float, text: str) -> None:
    assert top.short(number) == text


def test_top_prints_once_where_there_is_no_terminal(folder: Path) -> None:
    with served("--socket-path", folder / "s", "--control-path", folder / "c"):
        result = run("top", "--control-path", folder / "c")
    assert result.returncode == 0, result.stderr
    assert "\x1b" not in result.stdout
    assert result.stdout.count("device ") == 1


@pytest.mark.parametrize("end", ["q", "interrupt"])
def test_top_on_a_terminal_leaves_it_as_it_was(folder: Path, end: str) -> None:
    """The real thing on a pseudo terminal: it draws twice, and ends by a key or by Ctrl-C."""
    with served("--socket-path", folder / "s", "--control-path", folder / "c"):
        ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, WIDTH, 0, 0))
        before = termios.tcgetattr(theirs)
        process = subprocess.Popen(
            [*COMMAND, "top", "--control-path", folder / "c"],
            env=environment() | {"TERM": "xterm"},
            stdin=theirs,
            stdout=theirs,
            stderr=subprocess.PIPE,
            cwd=PROJECT,
            start_new_session=True,
        )
        try:
            shown = b""
            while shown.count(b"devices: 1") < 2:
                shown += os.read(ours, 4096)
            assert shown.startswith(b"\x1b[?1049h")
            bare = re.sub(rb"\x1b\[[?0-9]*[A-Za-z]", b"\r\n", shown)
            assert max(map(len, bare.split(b"\r\n"))) <= WIDTH
            if end == "q":
                os.write(ours, b"q")
            else:
                process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=SECONDS)
            assert process.returncode == (0 if end == "q" else 130), errors
            assert b"Traceback" not in errors
            assert os.read(ours, 4096).endswith(b"\x1b[?25h\x1b[?1049l")
            assert termios.tcgetattr(theirs) == before
        finally:
            process.kill()
            os.close(ours)
            os.close(theirs)
