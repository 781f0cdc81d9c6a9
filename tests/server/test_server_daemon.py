"""The daemon as a process: how it starts, whom it serves, how it ends, what it leaves behind."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import stat
from typing import TYPE_CHECKING

import pytest
import trio

from tests.server.server_process import (
    SECONDS,
    VERSION,
    client,
    negotiate,
    run,
    served,
    short_folder,
)
from vfio_user_virtio.backends.software.config import MemberConfig
from vfio_user_virtio.backends.software.owner import Owner
from vfio_user_virtio_server import daemon

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

GET_INFO = bytes.fromhex("0200 0400 20000000 00000000 00000000 10000000 00000000 0000000000000000")
GARBAGE = b"\xff" * 64


@pytest.fixture
def folder() -> Iterator[Path]:
    with short_folder() as path:
        yield path


def answers(sock: socket.socket) -> bool:
    """Whether a session that has negotiated answers DEVICE_GET_INFO."""
    sock.sendall(GET_INFO)
    reply = sock.recv(32, socket.MSG_WAITALL)
    return len(reply) == 32 and reply[:4] == GET_INFO[:4]


def hangs_up(sock: socket.socket) -> bool:
    """Whether the other end closes; what it sends before that does not matter."""
    sock.settimeout(SECONDS)
    try:
        while sock.recv(4096):
            pass
    except ConnectionResetError:
        pass
    return True


def send_until_full(sock: socket.socket) -> None:
    """Send commands, reading no answer, until the other end takes no more."""
    sock.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            sock.send(GET_INFO * 100)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_in_order_with_a_live_session(
    folder: Path, number: signal.Signals
) -> None:
    with (
        served("--socket-path", folder / "s") as server,
        client(folder / "s") as busy,
        socket.socket(socket.AF_UNIX) as waiting,
    ):
        waiting.connect(str(folder / "s"))
        assert answers(busy)
        exit_code, log = server.stop(number)
        assert exit_code == 0
        assert hangs_up(busy)
        assert hangs_up(waiting)
    assert os.listdir(folder) == []
    assert "Traceback" not in log
    assert f"{number.name}: ending" in log


def test_a_client_that_does_not_read_does_not_keep_it(folder: Path) -> None:
    with served("--socket-path", folder / "s") as server, client(folder / "s") as stuck:
        send_until_full(stuck)
        exit_code, log = server.stop()
    assert exit_code == 0
    assert "Traceback" not in log


def test_what_the_service_manager_is_told(folder: Path) -> None:
    with served("--socket-path", folder / "s") as server:
        assert server.messages == ["READY=1"]
        assert server.next_message() == "STATUS=serving devices: 1, owners: 1"
        server.process.terminate()
        assert server.next_message() == "STOPPING=1"
        assert server.end()[0] == 0


def test_one_client_after_the_other_whatever_they_do(folder: Path) -> None:
    with served("--socket-path", folder / "s") as server:
        for _ in range(3):
            with client(folder / "s") as good:
                assert answers(good)
            with client(folder / "s") as bad:
                bad.sendall(GARBAGE)
                assert hangs_up(bad)
            with socket.socket(socket.AF_UNIX) as worse:
                worse.connect(str(folder / "s"))
                worse.sendall(GARBAGE)
                assert hangs_up(worse)
        exit_code, log = server.stop()
    assert exit_code == 0
    assert "Traceback" not in log


def test_the_socket_has_the_mode_and_group_that_were_asked_for(folder: Path) -> None:
    arguments = ("--socket-mode", "0640", "--socket-group", str(os.getegid()))
    with served("--socket-path", folder / "s", *arguments):
        status = (folder / "s").lstat()
    assert stat.S_IMODE(status.st_mode) == 0o640
    assert status.st_gid == os.getegid()


def test_a_killed_server_is_replaced_and_a_live_one_is_not(folder: Path) -> None:
    with served("--socket-path", folder / "s") as first:
        first.process.kill()
        first.end()
    assert os.listdir(folder) == ["s"]
    with served("--socket-path", folder / "s"), client(folder / "s") as sock:
        second = run("serve", "--socket-path", folder / "s", "--log-level", "error")
        assert second.returncode == os.EX_UNAVAILABLE
        assert "alive" in second.stderr
        assert answers(sock)
    assert os.listdir(folder) == ["s"], "the server was killed in the end"


def test_a_path_that_somebody_else_took_is_left(folder: Path) -> None:
    with served("--socket-path", folder / "s") as server:
        (folder / "s").unlink()
        (folder / "s").write_text("precious")
        assert server.stop()[0] == 0
    assert (folder / "s").read_text() == "precious"


def test_one_off_ends_after_the_first_session(folder: Path) -> None:
    with served("--socket-path", folder / "s", "--one-off") as server:
        with client(folder / "s") as sock:
            assert answers(sock)
            assert os.listdir(folder) == []
        exit_code, log = server.end()
    assert exit_code == 0
    assert "session over: the client closed the connection" in log


def test_a_passed_socket_that_listens_stays_its_owners(folder: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "s"))
        listener.listen()
        for _ in range(2):
            with served("--fd", str(listener.fileno()), pass_fds=[listener.fileno()]) as server:
                with client(folder / "s") as sock:
                    assert answers(sock)
                assert server.stop()[0] == 0
        listener.settimeout(SECONDS)
        with socket.socket(socket.AF_UNIX) as late:
            late.connect(str(folder / "s"))
            listener.accept()[0].close()
    assert os.listdir(folder) == ["s"]


@pytest.mark.parametrize("one_off", [False, True])
async def test_a_socket_that_breaks_is_that_devices_affair(
    one_off: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """accept() of a socket that does not listen fails as that of a broken one would."""
    member = Owner("o").add_member(MemberConfig(mac=bytes.fromhex("020000000001")))
    ours, theirs = socket.socketpair(type=socket.SOCK_DGRAM)
    broken: list[str] = []
    with ours, theirs:
        theirs.send(b"readable")
        with trio.fail_after(SECONDS):
            await daemon._serve_device("vm1", member, daemon._Door(ours, True), one_off, broken)
    (reason,) = broken
    assert reason.startswith("vm1: no client can come any more: ")
    assert reason in caplog.messages


@pytest.mark.parametrize("redirections", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_standard_descriptors_may_be_closed(folder: Path, redirections: str) -> None:
    prefix = ("sh", "-c", f'exec "$@" {redirections}', "sh")
    with served("--socket-path", folder / "s", prefix=prefix) as server, client(folder / "s") as s:
        assert answers(s)
        assert server.stop()[0] == 0


def test_a_passed_connection_is_the_only_one() -> None:
    ours, theirs = socket.socketpair()
    with (
        ours,
        theirs,
        served("--fd", str(theirs.fileno()), pass_fds=[theirs.fileno()]) as server,
    ):
        theirs.close()
        negotiate(ours)
        assert answers(ours)
        ours.close()
        assert server.end()[0] == 0


def test_several_devices_do_not_disturb_each_other(folder: Path) -> None:
    config = folder / "c.toml"
    config.write_text(
        f"""
        [[owner]]
        uplink = "stream-listen:{folder}/uplink"
        pcap = "{folder}/uplink.pcapng"
        [[owner.member]]
        socket_path = "{folder}/a"
        pcap = "{folder}/a.pcapng"
        [[owner.member]]
        socket_path = "{folder}/b"
        [[owner]]
        [[owner.member]]
        socket_path = "{folder}/c"
        """
    )
    with served("--config", config) as server:
        assert server.next_message() == "STATUS=serving devices: 3, owners: 2"
        with client(folder / "a") as a, client(folder / "b") as b, client(folder / "c") as c:
            b.sendall(GARBAGE)
            assert hangs_up(b)
            assert answers(a)
            assert answers(c)
        with client(folder / "b") as b:
            assert answers(b)
        with socket.socket(socket.AF_UNIX) as peer:
            peer.connect(f"{folder}/uplink")
        assert server.stop()[0] == 0
    assert sorted(os.listdir(folder)) == ["a.pcapng", "c.toml", "uplink.pcapng"]
    assert stat.S_IMODE((folder / "a.pcapng").stat().st_mode) == 0o600


def test_nothing_is_left_when_the_second_device_cannot_start(folder: Path) -> None:
    config = folder / "c.toml"
    config.write_text(
        f"""
        [[owner]]
        [[owner.member]]
        socket_path = "{folder}/a"
        [[owner.member]]
        socket_path = "{folder}/c.toml"
        """
    )
    result = run("serve", "--config", config, "--log-level", "error")
    assert result.returncode == os.EX_CANTCREAT
    assert os.listdir(folder) == ["c.toml"]


def test_a_client_that_stops_in_the_middle_of_a_message_does_not_stop_others(folder: Path) -> None:
    config = folder / "c.toml"
    config.write_text(
        f"[[owner]]\n[[owner.member]]\nsocket_path = '{folder}/a'\n"
        f"[[owner.member]]\nsocket_path = '{folder}/b'\n"
    )
    with (
        served("--config", config) as server,
        socket.socket(socket.AF_UNIX) as slow,
        client(folder / "b") as sock,
    ):
        slow.connect(f"{folder}/a")
        slow.sendall(VERSION[:17])
        assert answers(sock)
        assert server.stop()[0] == 0


def test_logs_as_json_and_for_the_journal(folder: Path) -> None:
    with served("--socket-path", folder / "s", "--log-format", "journal") as server:
        assert all(line.startswith("<6>") for line in server.stop()[1].splitlines())
    with served("--socket-path", folder / "s", "--log-format", "json") as server:
        assert all(line.startswith('{"time": "') for line in server.stop()[1].splitlines())
