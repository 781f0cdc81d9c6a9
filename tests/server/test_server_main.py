"""The command line: exit codes, one line of explanation, and no traceback that a user caused."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from typing import TYPE_CHECKING, cast

import pytest

from tests.server.server_process import environment, run, short_folder
from vfio_user_virtio_server import main

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def explained(result: subprocess.CompletedProcess[str], exit_code: int) -> str:
    """The one line that explains an exit code."""
    assert result.returncode == exit_code, result.stderr
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("vfio-user-virtio")
    return line


@pytest.fixture
def restored_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What `main` changes for good in its own process is changed back here."""
    root = logging.getLogger()
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(logging, "raiseExceptions", logging.raiseExceptions)
    monkeypatch.setattr(root, "handlers", root.handlers[:])
    level = root.level
    yield
    logging.captureWarnings(capture=False)
    root.setLevel(level)


def test_version() -> None:
    result = run("--version")
    assert result.returncode == 0
    assert re.fullmatch(r"vfio-user-virtio (\d+\.\d+\.\d+|\(not installed.*\))\n", result.stdout)


@pytest.mark.parametrize("command", [None, *main.COMMANDS])
def test_help(command: str | None) -> None:
    result = run(*([command] if command else []), "--help")
    assert result.returncode == 0
    assert result.stdout.startswith("usage: vfio-user-virtio")
    for name, entry in main.COMMANDS.items():
        if command is None:
            assert name in result.stdout
            assert entry.summary in result.stdout


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ("", "required: COMMAND"),
        ("srve", "invalid choice: 'srve'"),
        ("serve --no-such-option", "--no-such-option"),
        ("serve --socket-pat /x", "--socket-pat"),
        ("serve extra", "extra"),
        ("serve --socket-path /x --fd 3", "not allowed with"),
        ("serve --config x --fd 3", "not allowed with"),
        ("serve --fd 0", "0 is not a passed descriptor"),
        ("serve --fd x", "'x' is not a number"),
        ("serve --socket-path @x", "abstract"),
        (f"serve --socket-path /{'x' * 107}", "108 bytes"),
        ("serve --mac 01:00:00:00:00:00", "group address"),
        ("serve --mtu big", "'big' is not a number"),
        ("serve --uplink tap", "'tap' is not an uplink"),
        ("serve --max-tx-rate fast", "'fast' is not a rate"),
        ("serve --socket-mode rw", "octal"),
        ("serve --socket-mode 0660", "add --socket-path"),
        ("serve --socket-group kvm", "add --socket-path"),
        ("serve --config x --mac 52:54:00:00:00:01", "--mac does not go with --config"),
        ("serve --config x --allow-unsealed-memory", "--allow-unsealed-memory does not go"),
        ("--log-level loud serve", "'loud'"),
        ("serve --log-format xml", "'xml'"),
        ("probe", "--socket-path"),
    ],
)
@pytest.mark.usefixtures("restored_process")
def test_what_is_wrong_on_the_command_line(
    arguments: str, problem: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """In this process, since there are many; none gets as far as to start anything."""
    try:
        exit_code: object = main.main(arguments.split())
    except SystemExit as end:
        exit_code = end.code
    output, errors = capfd.readouterr()
    result = subprocess.CompletedProcess(arguments, cast("int", exit_code), output, errors)
    assert problem in explained(result, os.EX_USAGE)


@pytest.mark.parametrize(
    ("arguments", "exit_code", "problem"),
    [
        ("--mtu 67", os.EX_CONFIG, "mtu 67 .* 68 to 65535"),
        ("--queue-pairs 9", os.EX_CONFIG, "queue_pairs 9 .* 1 to 8"),
        ("--max-tx-rate 1", os.EX_CONFIG, "max_tx_rate 1 "),
        ("--uplink tap:vuvnone0", os.EX_UNAVAILABLE, "no network interface vuvnone0.*ip tuntap"),
        ("--uplink tap-fd:900", os.EX_USAGE, "fd 900 is not"),
        ("--uplink stream-listen:/nonexistent/s", os.EX_CANTCREAT, "/nonexistent/s"),
        ("--uplink datagram:/nonexistent/s,/r", os.EX_CANTCREAT, "/nonexistent/s"),
        ("--pcap /nonexistent/p", os.EX_CANTCREAT, "cannot capture device in /nonexistent/p"),
        ("--pcap /dev/full", os.EX_CANTCREAT, "/dev/full: No space"),
        ("--socket-group nosuchgroup", os.EX_CONFIG, "no group 'nosuchgroup'"),
    ],
)
def test_what_keeps_the_daemon_from_starting(arguments: str, exit_code: int, problem: str) -> None:
    with short_folder() as folder:
        result = run(
            "serve", "--socket-path", folder / "s", "--log-level", "error", *arguments.split()
        )
        assert re.search(problem, explained(result, exit_code))
        assert os.listdir(folder) == []


@pytest.mark.parametrize(
    ("arguments", "exit_code", "problem"),
    [
        ("--fd 900", os.EX_CONFIG, "descriptor 900 .--fd. is not open"),
        ("", os.EX_CONFIG, "device got no socket.*socket_path"),
        ("--config /nonexistent.toml", os.EX_NOINPUT, "/nonexistent.toml"),
        ("--config /", os.EX_NOINPUT, "cannot read the configuration"),
        ("--config /dev/null", os.EX_CONFIG, r"no \[\[owner\]\]"),
        ("--socket-path /nonexistent/s", os.EX_CANTCREAT, "/nonexistent is not a folder"),
        ("--socket-path /", os.EX_CANTCREAT, "/ is a folder"),
        ("--socket-path /proc/s", os.EX_CANTCREAT, "/proc/s"),
    ],
)
def test_sockets_and_files_that_are_not_there(arguments: str, exit_code: int, problem: str) -> None:
    result = run("serve", "--log-level", "error", *arguments.split())
    assert re.search(problem, explained(result, exit_code))


def test_an_uplink_without_a_capture_is_no_uplink_to_capture(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text("[[owner]]\npcap = '/tmp/p'\n[[owner.member]]\nsocket_path = '/tmp/vu-never'\n")
    line = explained(run("serve", "--log-level", "error", "--config", path), os.EX_CONFIG)
    assert "no uplink to capture" in line


def test_a_bug_exits_with_its_own_code_and_shows_the_traceback() -> None:
    code = (
        "import sys\n"
        "from vfio_user_virtio_server import main\n"
        "main.COMMANDS = {'serve': main._Command('json', '')}\n"
        "main.main(['serve'])\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == os.EX_SOFTWARE
    assert "Traceback" in result.stderr
    assert "this is a bug" in result.stderr


def test_options_for_logs_go_before_and_after_the_command() -> None:
    for arguments in (("--log-level", "error", "serve"), ("serve", "--log-level", "error")):
        explained(run(*arguments, "--config", "/dev/null"), os.EX_CONFIG)


def test_nothing_heavy_is_imported_before_it_is_needed() -> None:
    """Start-up is what a client waits for behind a socket unit."""
    code = (
        "import sys\n"
        "before = set(sys.modules)\n"
        "from vfio_user_virtio_server import main\n"
        "print({'trio', 'tomllib', 'cffi', 'json'} & (set(sys.modules) - before))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout == "set()\n"
