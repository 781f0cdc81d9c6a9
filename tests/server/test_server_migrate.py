"""migrate: two daemons and the command between them; reports, Ctrl-C, and what goes wrong."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import select
import signal
import socket
import subprocess
from typing import TYPE_CHECKING, Final

import attrs
import pytest
import trio

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
from vfio_user_virtio_server import main, migrate
from vfio_user_virtio_server.cancellable import Cancellable

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator
    from pathlib import Path


MAC_A: Final = "52:54:00:00:00:0a"
MAC_B: Final = "52:54:00:00:00:0b"
KEYS: Final = (
    "from to precopy from_options to_options phases seconds downtime_seconds byte_count "
    "source_state image"
)


@attrs.frozen
class Two:
    """A source at `a` and a target at `b`, in `folder`."""

    folder: Path
    source: Server
    target: Server

    @property
    def arguments(self) -> list[str]:
        return ["migrate", "--from-socket", f"{self.folder}/a", "--to-socket", f"{self.folder}/b"]

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


def explained(exit_code: int, *arguments: str | Path) -> str:
    result = run(*arguments)
    assert result.returncode == exit_code, result.stderr
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    return line


def wait_for_log(server: Server, text: str) -> None:
    """Read the log of a server up to a line that has `text`."""
    assert server.process.stderr is not None
    for line in server.process.stderr:
        if text in line:
            return
    raise AssertionError(f"the server ended without {text}")


def test_reports_and_the_image(tmp_path: Path) -> None:
    stream = tmp_path / "stream"
    with two() as both:
        result = run(*both.arguments, "--image", stream)
        assert (result.returncode, result.stderr) == (0, "")
        first, *rest = result.stdout.splitlines()
        assert first.startswith(f"{both.folder}/a to {both.folder}/b: ")
        assert f"{stream.stat().st_size:,} bytes in " in first
        assert " downtime " in first
        phases = [line.split()[0] for line in rest]
        assert phases[:6] == ["prepare", "pre-copy", "stop", "copy", "resume", "finish"]
        assert rest[6:] == [
            "    The source offers STOP_COPY P2P PRE_COPY",
            "    The target offers STOP_COPY P2P PRE_COPY",
            "    The target runs, the source is in STOP; guest memory was not moved",
            "    The state stays in the target's member for its next client, until one resets it",
        ]
        assert both.mac_of_target() == MAC_A

        result = run(*both.arguments, "--json", "--no-precopy", "--keep-source")
        assert (result.returncode, result.stderr) == (0, "")
        told = json.loads(result.stdout)
        assert list(told) == KEYS.split()
        assert (told["precopy"], told["source_state"], told["image"]) == (False, "RUNNING", None)
        assert told["to_options"] == ["STOP_COPY", "P2P", "PRE_COPY"]
        names = [phase["name"] for phase in told["phases"]]
        assert names == ["prepare", "stop", "copy", "resume", "finish"]
        assert list(told["phases"][0]) == ["name", "seconds", "byte_count"]
        down = sum(phase["seconds"] for phase in told["phases"][1:4])
        assert told["downtime_seconds"] == pytest.approx(down)
        assert 0 < told["downtime_seconds"] < told["seconds"]

        for server in (both.source, both.target):
            assert server.stop()[0] == 0

    assert stream.stat().st_mode & 0o777 == 0o600
    shown = run("image", "show", stream, "--json")
    records = json.loads(shown.stdout)["records"]
    assert [record["kind"] for record in records] == ["image", "image", "private"]
    assert {fact["name"]: fact["value"] for fact in records[-1]["facts"]}["mac"] == MAC_A


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_cancels(number: signal.Signals, code: int) -> None:
    """In the middle of PRE_COPY, which more rounds than anyone waits for make long."""
    with two() as both:
        drawn = both.folder / "r.svg"
        process = subprocess.Popen(
            [*COMMAND, *both.arguments, "--rounds", "3600", "--report", drawn],
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        wait_for_log(both.source, "PRE_COPY")
        process.send_signal(number)
        output, errors = process.communicate(timeout=SECONDS)
        assert (process.returncode, output) == (code, "")
        assert errors == "vfio-user-virtio: cancelled; the source runs on\n"
        assert ">cancelled; the source runs on</text>" in drawn.read_text()
        wait_for_log(both.source, "RUNNING")
        wait_for_log(both.target, "RUNNING, by a reset")
        assert both.mac_of_target() == MAC_B
        assert run(*both.arguments).returncode == 0, "it can be done again"


def test_progress_on_a_terminal() -> None:
    with two() as both:
        ours, theirs = pty.openpty()
        try:
            process = subprocess.Popen(
                [*COMMAND, *both.arguments],
                env=environment(),
                stdout=subprocess.PIPE,
                stderr=theirs,
                text=True,
            )
            output, _ = process.communicate(timeout=SECONDS)
            assert process.returncode == 0
            assert output
            shown = ""
            while select.select([ours], [], [], 0)[0]:
                shown += os.read(ours, 4096).decode()
        finally:
            os.close(ours)
            os.close(theirs)
    assert shown.startswith("\r\33[Kprepare: 0 bytes")
    assert "\r\33[Kresume: " in shown
    assert shown.endswith("\r\33[K")
    assert "\n" not in shown


@pytest.mark.parametrize("precopy", [(), ("--no-precopy",)], ids=["pre-copy", "stop-copy"])
def test_what_does_not_fit_is_refused_by_name(tmp_path: Path, precopy: tuple[str, ...]) -> None:
    with two(target_pairs=2) as both:
        files = ("--image", tmp_path / "s", "--report", tmp_path / "r.svg")
        line = explained(os.EX_CONFIG, *both.arguments, *precopy, *files)
        assert "the target would refuse what the source has, with: DEV_FEATURES" in line
        assert ": only this device offers MQ; configure source and target with the same" in line
        assert "PCI_COMMON_CFG num_queues" in line
        assert line.endswith("the source runs on")
        assert both.mac_of_target() == MAC_B
        both.source.process.send_signal(signal.SIGTERM)
        _, log = both.source.process.communicate(timeout=SECONDS)
        assert "PRE_COPY" in log
        assert "stopped" not in log
    drawn = (tmp_path / "r.svg").read_text()
    assert drawn.count(", failed</text>") == 1
    assert "the source runs on</text>" in drawn
    if not precopy:
        assert run("image", "show", tmp_path / "s").returncode == 0, "as far as it came"


def test_the_state_stays_for_the_next_client() -> None:
    with two() as both:
        result = run(*both.arguments)
        last = result.stdout.splitlines()[-1]
        assert last.endswith("in the target's member for its next client, until one resets it")
        assert both.mac_of_target() == MAC_A


def test_files_that_cannot_be_written() -> None:
    with two() as both:
        line = explained(os.EX_CANTCREAT, *both.arguments, "--image", "/nonexistent/s")
        assert "cannot save the stream in /nonexistent/s: No such file" in line
        line = explained(os.EX_IOERR, *both.arguments, "--image", "/dev/full")
        assert "/dev/full: No space left on device; the source runs on" in line
        assert both.mac_of_target() == MAC_B


def test_nobody_there() -> None:
    with short_folder() as folder, served("--socket-path", folder / "a"):
        ends = ("--from-socket", folder / "a", "--to-socket", folder / "b")
        line = explained(os.EX_NOINPUT, "migrate", *ends)
        assert f"cannot connect to {folder}/b" in line
        assert line.endswith("nothing was changed")


def options(folder: Path) -> argparse.Namespace:
    arguments = ["migrate", "--from-socket", f"{folder}/a", "--to-socket", f"{folder}/b"]
    return main._parser(arguments).parse_args(arguments)


async def test_a_device_that_is_in_use(autojump_clock: trio.testing.MockClock) -> None:
    """Its server takes the connection and says nothing."""
    with short_folder() as folder, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{folder}/a")
        listener.listen()
        async with trio.open_nursery() as nursery:
            with pytest.raises(HostError, match="is a VM using it") as caught:
                await migrate.Attempt(options(folder)).run(Cancellable(nursery))
    assert caught.value.exit_code == os.EX_UNAVAILABLE


def test_a_server_that_ends_meanwhile() -> None:
    with two() as both:
        process = subprocess.Popen(
            [*COMMAND, *both.arguments, "--rounds", "3600"],
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        wait_for_log(both.source, "PRE_COPY")
        both.source.process.kill()
        output, errors = process.communicate(timeout=SECONDS)
        assert (process.returncode, output) == (os.EX_IOERR, "")
        (line,) = errors.splitlines()
        assert "the server closed the connection" in line
        assert line.endswith("the source does not run on, its state is unknown")
        with client(both.folder / "b"):
            pass


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ("--from-socket /a", "--to-socket"),
        ("--from-socket /a --to-socket /a", "are the same"),
        ("--from-socket /a --to-socket @b", "abstract"),
        ("--from-socket /a --to-socket /b --rounds -1", "0 to 3600"),
        ("--from-socket /a --to-socket /b --rounds 3601", "0 to 3600"),
        ("--from-socket /a --to-socket /b --timeout 0", "'0' is not a number of seconds"),
    ],
)
def test_usage(arguments: str, problem: str) -> None:
    assert problem in explained(os.EX_USAGE, "migrate", *arguments.split())


def test_help_says_what_it_is_not() -> None:
    text = " ".join(run("migrate", "--help").stdout.split())
    assert "Guest memory is not moved." in text
    assert "one that a VM uses cannot be migrated this way" in text
    assert "The state stays in the target's member for its next client" in text


def test_a_server_without_p2p_migrates_with_one_that_has_it() -> None:
    with (
        short_folder() as folder,
        served("--socket-path", folder / "a", "--mac", MAC_A, "--no-p2p"),
        served("--socket-path", folder / "b", "--mac", MAC_B),
    ):
        sockets = ("--from-socket", folder / "a", "--to-socket", folder / "b")
        told = json.loads(run("migrate", *sockets, "--json").stdout)
        assert told["from_options"] == ["STOP_COPY", "PRE_COPY"]
        assert told["to_options"] == ["STOP_COPY", "P2P", "PRE_COPY"]
        assert told["precopy"]


def test_a_time_line(tmp_path: Path) -> None:
    with two() as both:
        for name in ("r.svg", "r.html"):
            result = run(*both.arguments, "--keep-source", "--report", tmp_path / name)
            assert (result.returncode, result.stderr) == (0, "")
            drawn = (tmp_path / name).read_text()
            assert f">{both.folder}/a to {both.folder}/b</text>" in drawn
            for phase in ("prepare", "pre-copy", "stop", "copy", "resume", "finish"):
                assert f">{phase}</text>" in drawn
        line = explained(os.EX_CANTCREAT, *both.arguments, "--report", "/nonexistent/r.svg")
        assert line.endswith(
            "cannot write the report to /nonexistent/r.svg: No such file or directory"
        )
        wrong = explained(os.EX_USAGE, *both.arguments, "--report", "r.png")
        assert "its name ends in .html or .svg" in wrong
