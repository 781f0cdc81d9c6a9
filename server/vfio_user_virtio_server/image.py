"""``vfio-user-virtio image``: look into saved migration streams (what MIG_DATA_READ gives).

``image show FILE`` prints a stream by name and value; ``image diff A B`` says in what the states
differ that two streams end in, with the exit codes of diff(1): 0 for nothing, 1 for something.
``-`` is standard input.  Streams of Linux's vfio-virtio driver are read as well as ours.

A file that is no stream, or stops being one, is explained in one line (EX_DATAERR), behind what
could be read of it.

``--json`` prints one object.  Of ``show``: ``file``, ``records`` (each with ``kind``, which is
image, private or skipped, ``offset`` and ``size`` in bytes, ``tag``, ``facts``, ``notes``) and
``problem``; a fact has ``name``, ``value``, ``optional`` and ``problem``.  Of ``diff``:
``differences``, each with ``name``, ``ours``, ``theirs`` and ``text``.  These keys are stable.
"""

from __future__ import annotations

import json
import os
import sys
from typing import TYPE_CHECKING, Final, NoReturn

import attrs

from vfio_user_virtio.errors import ClientError, HostError
from vfio_user_virtio.migration.stream_facts import (
    PRIVATE,
    SKIPPED,
    differences,
    final_state,
    read_stream_untrusted,
)
from vfio_user_virtio.virtio.part_text import text
from vfio_user_virtio_server import log

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from vfio_user_virtio.migration.stream_facts import RecordFacts

DIFFERENT: Final = 1
"""The exit code of ``image diff`` if there are differences."""

STANDARD_INPUT: Final = "-"
_PIECE: Final = 1 << 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    about = "print a saved migration stream by name and value"
    show = actions.add_parser("show", help=about, description=about, allow_abbrev=False)
    show.add_argument("file", metavar="FILE", help="the stream; - is standard input")
    about = "say in what the states differ that two streams end in; exits with 1 if they do"
    diff = actions.add_parser("diff", help=about, description=about, allow_abbrev=False)
    diff.add_argument("ours", metavar="A", help="a stream; - is standard input")
    diff.add_argument("theirs", metavar="B", help="another one")
    for action in (show, diff):
        action.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> int:
    if options.action == "show":
        return _show_json(options.file) if options.json else _show_text(options.file)
    return _diff(options.ours, options.theirs, as_json=options.json)


def records(path: str) -> Iterator[RecordFacts]:
    """The records in the file at `path`, each as it was read.  Raises HostError."""
    try:
        yield from read_stream_untrusted(_pieces(path))
    except ClientError as error:
        _refuse(path, str(error.args[0]))


def lines(number: int, record: RecordFacts) -> Iterator[str]:
    """The report on one record for people."""
    kind = "record of vfio-user-virtio" if record.kind == PRIVATE else record.kind
    yield f"record {number} at byte {record.offset}: {kind}, {record.size} bytes"
    for fact in record.facts:
        mark = " (optional)" if fact.optional else ""
        yield f"    {fact.name}{mark}: {text(fact.value, fact.name)}"
        if fact.problem is not None:
            yield f"        Problem: {fact.problem}"
    for note in record.notes:
        yield f"    Note: {note}"


def _show_text(path: str) -> int:
    problems = 0
    for number, record in enumerate(records(path), 1):
        print(*lines(number, record), sep="\n")
        problems += len(record.problems)
    return _checked(path, problems)


def _show_json(path: str) -> int:
    found: list[RecordFacts] = []
    problem: HostError | None = None
    try:
        found.extend(records(path))
    except HostError as error:
        if error.exit_code != os.EX_DATAERR:
            raise
        problem = error
    described = {
        "file": path,
        "records": [_described(record) for record in found],
        "problem": None if problem is None else str(problem),
    }
    print(json.dumps(described, indent=2))
    if problem is not None:
        raise problem
    return _checked(path, sum(len(record.problems) for record in found))


def _described(record: RecordFacts) -> dict[str, object]:
    return attrs.asdict(record, filter=lambda attribute, _: attribute.name != "raw")


def _diff(ours: str, theirs: str, *, as_json: bool) -> int:
    if ours == theirs == STANDARD_INPUT:
        raise HostError("only one of two streams can be standard input", exit_code=os.EX_USAGE)
    found = differences(*(final_state(_known(path)) for path in (ours, theirs)))
    if as_json:
        shown = [attrs.asdict(difference) for difference in found]
        print(json.dumps({"ours": ours, "theirs": theirs, "differences": shown}, indent=2))
    elif found:
        print(log.escape(f"--- {ours}"))
        print(log.escape(f"+++ {theirs}"))
        print(*(f"{difference.name}: {difference.text}" for difference in found), sep="\n")
    return DIFFERENT if found else os.EX_OK


def _known(path: str) -> Iterator[RecordFacts]:
    return (record for record in records(path) if record.kind != SKIPPED)


def _checked(path: str, problems: int) -> int:
    """EX_OK; raises HostError if the stream has malformed values."""
    if problems:
        _refuse(path, f"values that are malformed: {problems}; a target would refuse them")
    return os.EX_OK


def _refuse(path: str, problem: str) -> NoReturn:
    sys.stdout.flush()  # what could be read comes before why the rest could not
    raise HostError(f"{path}: {problem}", exit_code=os.EX_DATAERR) from None


def _pieces(path: str) -> Iterator[bytes]:
    stdin = path == STANDARD_INPUT
    try:
        with open(0 if stdin else path, "rb", closefd=not stdin) as file:
            while piece := file.read(_PIECE):
                yield piece
    except OSError as error:
        raise HostError(f"cannot read {path}: {error.strerror}", exit_code=os.EX_NOINPUT) from None
