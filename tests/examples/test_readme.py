"""The README tells the truth: its commands, options, files, figures and names are those there are.

What it says of `serve`, `probe` and QEMU is run, not only looked for.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import tomllib
from typing import TYPE_CHECKING, Final

import pytest
import trio

from tests.examples.example_process import EXAMPLES, PROJECT, shell_words
from tests.server.software import software
from tests.testbed.server_process import COMMAND, serve
from vfio_user_virtio import limits
from vfio_user_virtio.backends.software.config import DEFAULT_FEATURES
from vfio_user_virtio.virtio.features import feature_names
from vfio_user_virtio_server import values
from vfio_user_virtio_server.config import parse_document
from vfio_user_virtio_server.main import COMMANDS

if TYPE_CHECKING:
    from pathlib import Path

    from tests.testbed.netns import Netns

README: Final = (PROJECT / "README.md").read_text()
FENCED: Final = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCKS: Final = FENCED.findall(README)
PROSE: Final = FENCED.sub("", README)
CODE: Final = re.findall(r"`([^`]+)`", PROSE)
OPTION: Final = re.compile(r"--[a-z][a-z-]+")
SOCKET: Final = "/tmp/vm.sock"


def blocks(language: str, word: str) -> list[str]:
    """The fenced blocks in a language that have a word in them."""
    return [text for name, text in BLOCKS if name == language and word in text]


def section(title: str) -> str:
    return README.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def help_of(*command: str) -> str:
    return subprocess.run(
        [COMMAND, *command, "--help"], check=True, capture_output=True, text=True
    ).stdout


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def test_files_exist() -> None:
    tops = ("examples", "server", "tests", "vfio_user_virtio")
    named = [code for code in CODE if code.split("/")[0] in tops and "/" in code]
    assert len(named) > 20
    missing = [name for name in named if not (PROJECT / name).exists()]
    assert missing == []


def test_every_example_is_named() -> None:
    support = {"account", "__pycache__"}
    assert {f"examples/{name}" for name in names(EXAMPLES) - support} <= set(CODE)


def test_parts_of_the_library_are_named() -> None:
    packages = {
        path.parent.name for path in (PROJECT / "vfio_user_virtio").glob("*/__init__.py")
    } - {"backends"}
    assert {f"vfio_user_virtio/{name}" for name in packages} <= set(CODE)


def test_make_targets_exist() -> None:
    lines = [line for _, text in BLOCKS for line in text.splitlines()] + CODE
    named = {match[1] for line in lines if (match := re.match(r"make ([a-z0-9]+)", line))}
    assert {"demo", "test", "unit", "e2e", "lint", "bench"} <= named
    targets = set(re.findall(r"^([a-z0-9]+):", (PROJECT / "Makefile").read_text(), re.MULTILINE))
    assert named <= targets


def test_options_are_all_there_and_exist() -> None:
    told = {option for code in CODE for option in OPTION.findall(code)}
    serve_options = set(OPTION.findall(help_of("serve")))
    assert serve_options - told == {"--help"}
    others = {option for name in COMMANDS for option in OPTION.findall(help_of(name))}
    assert told - others == set()
    assert set(OPTION.findall(help_of("migrate"))) - told == {"--help"}


def test_commands_are_taken() -> None:
    """Up to `--help`, which is put last, or before ``--``: what precedes it is parsed."""
    lines = "\n".join(text for language, text in BLOCKS if language != "toml") + "\n".join(CODE)
    commands = re.findall(rf"vfio-user-virtio ((?:{'|'.join(COMMANDS)}) .*)", lines)
    assert {command.split()[0] for command in commands} == set(COMMANDS)
    for command in commands:
        assert "usage: " in help_of(*shlex.split(command.partition(" -- ")[0])), command


def test_uplinks_exist() -> None:
    row = next(line for line in README.splitlines() if line.startswith("| `--uplink"))
    forms = re.findall(r"`([^`]+)`", row)[1:]
    for form in forms:
        values.parse_uplink(form.replace(":N", ":5") if form == "tap-fd:N" else form)
    kinds = {form.partition(":")[0] for form in forms}
    assert kinds == set(re.findall(r"\b[a-z][a-z-]+\b", values.UPLINK_FORMS)) - {"or"}


def test_configuration_is_taken() -> None:
    for text in blocks("toml", "[[owner]]"):
        (owner,) = software(parse_document(tomllib.loads(text), "README.md", seed=b"host"))
        assert [served.name for served in owner.members] == ["vm1", "vm2"]


def test_limits_are_those_there_are() -> None:
    rows = re.findall(r"^\| `([A-Z_]+)`.*\| (\d+) \|$", README, re.MULTILINE)
    assert len(rows) > 5
    assert {name: int(value) for name, value in rows} == {
        name: getattr(limits, name) for name, _ in rows
    }


def test_features_are_those_that_are_offered() -> None:
    text = re.search(r"Features offered: ([^;]+);", section("What works"))
    assert text is not None
    assert sorted(re.split(r",\s+", text[1])) == sorted(feature_names(DEFAULT_FEATURES))


def test_links_lead_somewhere() -> None:
    headings = {
        re.sub(r"[^a-z0-9 -]", "", heading.lower()).replace(" ", "-")
        for heading in re.findall(r"^#+ (.+)$", PROSE, re.MULTILINE)
    }
    anchors = re.findall(r"\]\(#([^)]+)\)", README)
    assert anchors
    assert set(anchors) <= headings


def test_qemu_options_are_those_of_the_example() -> None:
    (text,) = blocks("sh", "qemu-system-x86_64")
    program, *options = shell_words(text.replace(SOCKET, "$socket"))
    assert program == "qemu-system-x86_64"
    script = (EXAMPLES / "attach_qemu.sh").read_text()
    printed = [line for line in script.splitlines() if line.startswith("    -")]
    assert options == shell_words("\n".join(printed).replace(r"\\", "\\"))


@pytest.mark.slow
async def test_server_and_probe_do_as_told(netns: Netns, tmp_path: Path) -> None:
    """The commands that make a TAP device and serve on it, and what `probe` prints then."""
    (text,) = blocks("sh", "ip tuntap")
    *network, server = text.replace("sudo ", "").replace("$USER", "root").splitlines()
    for line in network:
        await netns.run(*line.split())
    socket = str(tmp_path / "vm.sock")
    program, *arguments = server.replace(SOCKET, socket).split()
    assert program == ".venv/bin/vfio-user-virtio"
    assert arguments.pop(0) == "serve"
    (console,) = blocks("console", "probe")
    command, *expected = console.replace(SOCKET, socket).splitlines()
    async with serve(tmp_path, *arguments, wrap=netns.wrap):
        probe = [COMMAND, *command.split()[2:]]
        done = await trio.run_process(probe, capture_stdout=True)
    printed = done.stdout.decode().splitlines()
    assert expected.pop().strip() == "…"
    assert [line for line in expected if line not in printed] == []
