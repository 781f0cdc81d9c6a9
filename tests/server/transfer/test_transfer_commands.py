"""send and receive as processes: real pipes and sockets, two servers, signals, refusals."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import shlex
import signal
import socket
import subprocess
from typing import TYPE_CHECKING, Final

import attrs
import pytest

from tests.server.server_process import (
    COMMAND,
    SECONDS,
    Server,
    client,
    environment,
    run,
    served,
    short_folder,
)
from vfio_user_virtio.errors import HostError
from vfio_user_virtio_server import main, receive, send

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MAC_A: Final = "52:54:00:00:00:0a"
MAC_B: Final = "52:54:00:00:00:0b"
SEND_KEYS: Final = (
    "name target_name precopy phases seconds downtime_seconds byte_count page_bytes target_runs "
    "source_state"
)
RECEIVE_KEYS: Final = "name source_name seconds byte_count page_bytes"
SENT_ONE_WAY: Final = "The source is in STOP; whether the target runs, its receiver knows"


@attrs.frozen
class Two:
    """A source at `a` and a target at `b`, in `folder`."""

    folder: Path
    source: Server
    target: Server

    @property
    def send(self) -> list[str]:
        return ["send", "--from-socket", f"{self.folder}/a"]

    @property
    def receive(self) -> list[str]:
        return ["receive", "--to-socket", f"{self.folder}/b"]

    def start(
        self, *arguments: str, stdin: int | None = None, stdout: int | None = None
    ) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*COMMAND, *arguments],
            env=environment(),
            stdin=subprocess.DEVNULL if stdin is None else stdin,
            stdout=subprocess.PIPE if stdout is None else stdout,
            stderr=subprocess.PIPE,
            text=True,
        )

    def mac_of_target(self) -> str:
        probed = run("probe", "--socket-path", self.folder / "b", "--json")
        return str(json.loads(probed.stdout)["net"]["mac"])


@contextlib.contextmanager
def two(*, target_pairs: int = 1) -> Iterator[Two]:
    with short_folder() as folder, contextlib.ExitStack() as stack:
        servers = [
            stack.enter_context(
                served("--socket-path", folder / name, "--mac", mac, "--queue-pairs", str(pairs))
            )
            for name, mac, pairs in (("a", MAC_A, 1), ("b", MAC_B, target_pairs))
        ]
        yield Two(folder, *servers)


@contextlib.contextmanager
def one() -> Iterator[Path]:
    """A source at `a` in a folder."""
    with short_folder() as folder, served("--socket-path", folder / "a"):
        yield folder


def wait_for_log(server: Server, text: str) -> None:
    assert server.process.stderr is not None
    for line in server.process.stderr:
        if text in line:
            return
    raise AssertionError(f"the server ended without {text}")


def test_through_a_program(tmp_path: Path) -> None:
    with two() as both:
        drawn = tmp_path / "r.html"
        result = run(*both.send, "--json", "--report", drawn, "--", *COMMAND, *both.receive)
        assert result.returncode == 0, result.stderr
        told = json.loads(result.stdout)
        assert list(told) == SEND_KEYS.split()
        assert (told["target_runs"], told["source_state"]) == (True, "STOP")
        assert (told["name"], told["target_name"]) == (f"{both.folder}/a", f"{both.folder}/b")
        assert list(told["phases"][0]) == ["name", "seconds", "byte_count", "page_count"]
        (line,) = result.stderr.splitlines()
        assert line.startswith(f"{both.folder}/a to {both.folder}/b: ")
        assert line.endswith("; the target runs")
        assert both.mac_of_target() == MAC_A
        assert ">resume</text>" in drawn.read_text()

        result = run(*both.send, "--keep-source", "--no-precopy", "--", *COMMAND, *both.receive)
        assert result.returncode == 0, result.stderr
        first, *phases, last = result.stdout.splitlines()
        assert " downtime " in first
        names = [phase.split()[0] for phase in phases]
        assert names == ["prepare", "stop", "copy", "resume", "finish"]
        assert last.strip() == "The target runs, the source is in RUNNING"


def test_through_a_pipe_of_the_shell() -> None:
    with two() as both:
        commands = [shlex.join([*COMMAND, *words]) for words in (both.send, both.receive)]
        result = subprocess.run(
            ["bash", "-o", "pipefail", "-c", " | ".join(commands)],
            env=environment(),
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        assert result.stdout.endswith("; the target runs\n")
        assert result.stderr.splitlines()[-1].strip() == SENT_ONE_WAY
        assert both.mac_of_target() == MAC_A


def test_through_a_file() -> None:
    """Which is a pipe that takes its time."""
    with two() as both:
        path = both.folder / "stream"
        with path.open("wb") as file:
            sent = both.start(*both.send, stdout=file.fileno())
            assert SENT_ONE_WAY in sent.communicate(timeout=SECONDS)[1]
        stream = path.read_bytes()

        def received(data: bytes) -> tuple[int, str]:
            path.write_bytes(data)
            with path.open("rb") as file:
                done = both.start(*both.receive, "--json", stdin=file.fileno())
                output, errors = done.communicate(timeout=SECONDS)
                if not done.returncode:
                    assert list(json.loads(output)) == RECEIVE_KEYS.split()
            return done.returncode, errors

        code, errors = received(stream[:-1])
        assert code == os.EX_IOERR
        assert "the transfer stream ends inside frame" in errors
        assert errors.endswith("; the target was reset\n")
        damaged = bytearray(stream)
        damaged[len(stream) // 2] ^= 1
        code, errors = received(bytes(damaged))
        assert code == os.EX_IOERR
        assert "has a wrong checksum; the target was reset" in errors
        code, errors = received(b"Permission denied\n")
        assert "this is no transfer stream: it begins with b'Permissi'" in errors
        assert errors.endswith("; nothing was changed\n")
        assert both.mac_of_target() == MAC_B
        assert received(stream) == (0, "")
        assert both.mac_of_target() == MAC_A


@pytest.mark.parametrize("address", ["unix", "tcp"])
def test_through_a_socket(address: str) -> None:
    with two() as both:
        where = f"{both.folder}/listener"
        if address == "tcp":
            with socket.create_server(("127.0.0.1", 0)) as free:
                where = f"127.0.0.1:{free.getsockname()[1]}"
        receiver = both.start(*both.receive, "--listen", where)
        wait_for_log(both.target, "connected")
        for _ in range(100):  # until it listens: it says nothing, and neither does the kernel
            sent = run(*both.send, "--connect", where)
            if sent.returncode != os.EX_UNAVAILABLE:
                break
        assert sent.returncode == 0, sent.stderr
        assert "The target runs, the source is in STOP" in sent.stdout
        output, errors = receiver.communicate(timeout=SECONDS)
        assert (receiver.returncode, errors) == (0, "")
        assert output.endswith("; the target runs\n")
        assert not os.path.exists(where), "its socket is gone"
        assert both.mac_of_target() == MAC_A


def test_through_a_descriptor() -> None:
    with two() as both:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            receiver = subprocess.Popen(
                [*COMMAND, *both.receive, "--fd", str(theirs.fileno())],
                env=environment(),
                pass_fds=[theirs.fileno()],
                stdout=subprocess.PIPE,
                text=True,
            )
            sent = run(*both.send, "--fd", str(ours.fileno()), pass_fds=[ours.fileno()])
        assert sent.returncode == 0, sent.stderr
        assert "The target runs" in sent.stdout
        assert "; the target runs" in receiver.communicate(timeout=SECONDS)[0]


def test_what_does_not_fit_is_refused_by_name_at_both_ends() -> None:
    with two(target_pairs=2) as both:
        drawn = both.folder / "r.svg"
        result = run(*both.send, "--report", drawn, "--", *COMMAND, *both.receive)
        assert (result.returncode, result.stdout) == (os.EX_CONFIG, "")
        assert ", failed</text>" in drawn.read_text()
        theirs, ours = result.stderr.splitlines()
        refusal = "the target would refuse what the source has, with: DEV_FEATURES"
        assert theirs.startswith(f"vfio-user-virtio: {refusal}")
        assert theirs.endswith("; the target was reset")
        assert ours.startswith(f"vfio-user-virtio: the receiver refuses: {refusal}")
        assert ours.endswith("; the source runs on")
        assert both.mac_of_target() == MAC_B


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_cancels(number: signal.Signals, code: int) -> None:
    with two() as both:
        drawn = both.folder / "r.svg"
        options = ("--rounds", "3600", "--report", str(drawn))
        sender = both.start(*both.send, *options, "--", *COMMAND, *both.receive)
        wait_for_log(both.source, "PRE_COPY")
        sender.send_signal(number)
        output, errors = sender.communicate(timeout=SECONDS)
        assert (sender.returncode, output) == (code, "")
        assert "vfio-user-virtio: cancelled; the source runs on\n" in errors
        assert "the sender gave up: cancelled; the target was reset\n" in errors
        assert ">cancelled; the source runs on</text>" in drawn.read_text()
        wait_for_log(both.source, "RUNNING")
        assert both.mac_of_target() == MAC_B
        again = run(*both.send, "--", *COMMAND, *both.receive)
        assert again.returncode == 0, "it can be done again"


@pytest.mark.parametrize("whom", ["receiver", "target"])
def test_who_is_killed_meanwhile(whom: str) -> None:
    with two() as both:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            receiver = subprocess.Popen(
                [*COMMAND, *both.receive, "--fd", str(theirs.fileno())],
                env=environment(),
                pass_fds=[theirs.fileno()],
                stderr=subprocess.PIPE,
                text=True,
            )
            sender = subprocess.Popen(
                [*COMMAND, *both.send, "--rounds", "1", "--fd", str(ours.fileno())],
                env=environment(),
                pass_fds=[ours.fileno()],
                stderr=subprocess.PIPE,
                text=True,
            )
        wait_for_log(both.source, "PRE_COPY")
        (receiver if whom == "receiver" else both.target.process).kill()
        _, errors = sender.communicate(timeout=SECONDS)
        assert sender.returncode == os.EX_IOERR
        assert errors.endswith("; the source runs on\n")
        receiver.communicate(timeout=SECONDS)
        wait_for_log(both.source, "RUNNING")


def test_a_reader_that_ends_is_no_sigpipe() -> None:
    with one() as folder:
        command = shlex.join([*COMMAND, "send", "--from-socket", f"{folder}/a"])
        result = subprocess.run(
            ["bash", "-c", f"{command} | true; echo ${{PIPESTATUS[0]}}"],
            env=environment(),
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
        assert result.stdout == f"{os.EX_IOERR}\n"
        (line,) = result.stderr.splitlines()
        assert line == (
            "vfio-user-virtio: the other end of the transfer takes no more (Broken pipe); "
            "the source runs on"
        )


def test_programs_that_are_no_receivers() -> None:
    with one() as folder:
        for program, problem in (
            (["sh", "-c", "exit 7"], "; sh ended with exit status 7; the source runs on"),
            (["sh", "-c", "kill -9 $$"], "; sh ended by signal 9; the source runs on"),
            (["sh", "-c", "echo hello; cat >&2"], "it begins with b'hello\\n'"),
            (["/nonexistent/ssh"], "cannot run /nonexistent/ssh: No such file or directory"),
        ):
            result = subprocess.run(
                [*COMMAND, "send", "--from-socket", f"{folder}/a", "--", *program],
                env=environment(),
                capture_output=True,
                timeout=SECONDS,
                check=False,
            )
            assert result.returncode in (os.EX_IOERR, os.EX_UNAVAILABLE)
            last = result.stderr.splitlines()[-1].decode(errors="replace")
            assert problem in last, last


def test_no_stream_goes_to_a_terminal_or_comes_from_one() -> None:
    with two() as both:
        ours, theirs = pty.openpty()
        try:
            for arguments in (both.send, both.receive):
                done = both.start(*arguments, stdin=theirs, stdout=theirs)
                _, errors = done.communicate(timeout=SECONDS)
                assert done.returncode == os.EX_USAGE
                assert "this terminal" in errors
        finally:
            os.close(ours)
            os.close(theirs)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ("send", "one of the arguments --from-socket --from-control is required"),
        ("send --from-socket /a --connect nowhere", "write a path with a /, or HOST:PORT"),
        ("send --from-socket /a --connect [::1]:0", "0 is no port; it can be 1 to 65535"),
        ("send --from-socket /a --connect h:1 -- ssh", "a program as well as --connect or --fd"),
        ("send --from-socket /a --connect h:1 --fd 3", "not allowed with"),
        ("send --from-socket /a --fd 99", "cannot connect to /a"),
        ("send --from-socket /a --rounds 9999", "0 to 3600"),
        ("receive --to-socket /a --to-control /b", "not allowed with"),
        ("receive --to-socket /nonexistent/a --listen /b", "cannot connect to /nonexistent/a"),
    ],
)
def test_usage(arguments: str, problem: str, capfd: pytest.CaptureFixture[str]) -> None:
    words = arguments.split()

    def run_it() -> None:
        options = main._parser(words).parse_args(words)
        (send if options.command == "send" else receive).run(options)

    with pytest.raises((SystemExit, HostError)) as caught:
        run_it()
    (line,) = capfd.readouterr().err.splitlines() or [str(caught.value)]
    assert problem in line


def test_sockets_that_cannot_be() -> None:
    with one() as folder:
        send_it, receive_it = (
            [command, f"--{way}-socket", f"{folder}/a"]
            for command, way in (("send", "from"), ("receive", "to"))
        )
        for arguments, code, problem in (
            ([*send_it, "--connect", f"{folder}/x"], os.EX_UNAVAILABLE, "cannot connect"),
            ([*receive_it, "--listen", f"{folder}/a"], os.EX_CANTCREAT, "Address already"),
            ([*receive_it, "--fd", "99"], os.EX_USAGE, "descriptor 99: Bad file descriptor"),
        ):
            result = run(*arguments)
            assert result.returncode == code
            assert problem in result.stderr
            assert result.stderr.endswith("; nothing was changed\n")


def test_devices_that_are_in_use_by_their_control_sockets() -> None:
    with (
        short_folder() as folder,
        contextlib.ExitStack() as stack,
        contextlib.ExitStack() as clients,
    ):
        for name, mac in (("a", MAC_A), ("b", MAC_B)):
            control = ("--control-path", folder / f"{name}.control")
            stack.enter_context(served("--socket-path", folder / name, "--mac", mac, *control))
            clients.enter_context(client(folder / name))
        send_it = ["send", "--from-control", f"{folder}/a.control"]
        receive_it = ["receive", "--to-control", f"{folder}/b.control"]
        result = run(*send_it, "--device", "no", "--", *COMMAND, *receive_it)
        assert result.returncode == os.EX_USAGE
        assert "name one of them with --device; nothing was changed" in result.stderr
        result = run(*send_it, "--", *COMMAND, *receive_it)
        assert result.returncode == 0, result.stderr
        assert "The target runs, the source is in STOP" in result.stdout
        result = run(*send_it, "--", *COMMAND, *receive_it)
        assert result.returncode == os.EX_UNAVAILABLE
        assert "is in state STOP, and control has its migration in hand" in result.stderr
        for name, expected in (("a", ("STOP", "control")), ("b", ("RUNNING", "nobody"))):
            shown = run("status", "--control-path", folder / f"{name}.control", "--json").stdout
            (device,) = json.loads(shown)["devices"]
            assert (device["migration"]["state"], device["migration"]["holder"]) == expected
        clients.close()
        probed = run("probe", "--socket-path", folder / "b", "--json")
        assert json.loads(probed.stdout)["net"]["mac"] == MAC_A
