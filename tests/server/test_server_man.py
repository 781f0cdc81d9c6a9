"""The manual page: every option that there is and no other, and roff that nobody warns of."""

from __future__ import annotations

import argparse
import itertools
import re
import shlex
import shutil
import subprocess
from typing import TYPE_CHECKING, Final

import pytest

from tests.server.server_process import PROJECT, SECONDS
from vfio_user_virtio_server import config, values
from vfio_user_virtio_server.main import COMMANDS, PROGRAM, _parser

if TYPE_CHECKING:
    from collections.abc import Iterator

PAGE: Final = PROJECT / "server" / "man" / f"{PROGRAM}.1"
OF_EVERY: Final = "Of every command"
INSTEAD: Final = "Instead of a command"
MACROS: Final = frozenset({"TH", "SH", "SS", "TP", "PP", "EX", "EE", "br"})
FONTS: Final = frozenset({"B", "I", "BR", "BI", "RB", "RI", "IR"})


def plain(line: str) -> str:
    """What a line of roff shows."""
    macro, _, rest = line.partition(" ")
    if macro in (".B", ".I"):
        line = rest
    elif re.fullmatch(r"\.[BIR]{2}", macro):
        line = "".join(shlex.split(rest.replace("\\", "\\\\")))
    line = re.sub(r"\\f[BIRP]", "", line)
    return line.replace("\\-", "-")


def sections() -> dict[str, list[str]]:
    """The lines of the page by section or, where there are some, subsection."""
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in PAGE.read_text().splitlines():
        if line.startswith((".SH ", ".SS ")):
            lines = found.setdefault(line[4:].strip('"'), [])
        else:
            lines.append(line)
    return found


def tags(lines: list[str]) -> set[str]:
    """What the paragraphs are about, which have a tag."""
    pairs = itertools.pairwise(lines)
    return {plain(tag) for macro, tag in pairs if macro == ".TP"}


def parsers(parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Each parser that has no commands of its own, by the names of its commands."""
    nested = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    for action in nested:
        for one in action.choices.values():
            yield from parsers(one)
    if not nested:
        yield parser.prog.removeprefix(f"{PROGRAM} "), parser


def shown(action: argparse.Action) -> str:
    """An option as the page shows it."""
    names = ", ".join(action.option_strings)
    if action.nargs == 0:
        return names
    if action.metavar is None and action.choices is not None:
        return f"{names} {{{','.join(action.choices)}}}"
    return f"{names} {action.metavar}"


WHOLE: Final = _parser(list(COMMANDS))
BY_COMMAND: Final = {
    name: {shown(action) for action in parser._actions if action.option_strings}
    for name, parser in parsers(WHOLE)
}


@pytest.mark.parametrize("command", BY_COMMAND)
def test_every_option_of_a_command_is_in_the_page_and_no_other(command: str) -> None:
    page = sections()
    common = tags(page[OF_EVERY])
    assert tags(page[command]) == BY_COMMAND[command] - common
    assert not tags(page[command]) & common


def test_so_are_those_without_a_command() -> None:
    page = sections()
    all_of_them = {shown(action) for action in WHOLE._actions if action.option_strings}
    assert tags(page[OF_EVERY]) | tags(page[INSTEAD]) == all_of_them


def test_all_commands_are_there() -> None:
    synopsis = "\n".join(map(plain, sections()["SYNOPSIS"]))
    assert {name.split()[0] for name in BY_COMMAND} == COMMANDS.keys()
    for name in BY_COMMAND:
        assert f"{PROGRAM} {name}" in synopsis


def test_uplinks_and_keys_are_there() -> None:
    page = sections()
    forms = set(re.split(r", | or ", values.UPLINK_FORMS))
    assert {tag.replace(" ", "") for tag in tags(page["UPLINKS"])} == forms
    assert config.__doc__ is not None
    keys = re.findall(r"^    (\w+) = ", config.__doc__, re.MULTILINE)
    text = " ".join(map(plain, page["CONFIGURATION FILE"]))
    assert len(keys) > 15
    assert [key for key in keys if not re.search(rf"\b{key}\b", text)] == []


def test_it_is_plain_roff() -> None:
    """All that a reader would warn of, as far as that can be told without groff."""
    lines = PAGE.read_text().splitlines()
    assert lines[1].startswith(".TH ")
    for number, line in enumerate(lines, 1):
        assert line.isascii(), number
        assert line == line.rstrip() != "", number
        assert "--" not in line, f"{number}: a hyphen that is to be typed is written \\-"
        if line.startswith(".") and not line.startswith('.\\"'):
            assert line[1:].split()[0] in MACROS | FONTS, number
    assert lines.count(".EX") == lines.count(".EE")
    if shutil.which("groff") is not None:
        result = subprocess.run(
            ["groff", "-man", "-Tutf8", "-ww", "-z", str(PAGE)],
            capture_output=True,
            text=True,
            check=False,
            timeout=SECONDS,
        )
        assert (result.returncode, result.stderr) == (0, "")
