"""Log lines: one line each, whatever a guest puts into them, and never a reason to fail."""

from __future__ import annotations

import io
import json
import logging
import os
import sys
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfio_user_virtio_server import log
from vfio_user_virtio_server.log import JournalFormatter, JsonFormatter, LogFormat, TextFormatter

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

FORGED = "hello\n<0>forged\x1b[2J\u2028\udcff"


def record(
    message: str, level: int = logging.INFO, *, traceback: bool = False
) -> logging.LogRecord:
    error = None
    if traceback:
        try:
            int(FORGED)
        except ValueError:
            error = sys.exc_info()
    made = logging.LogRecord("session", level, __file__, 1, "%s", (message,), error)
    made.created, made.msecs = 0.0, 0.0
    return made


@pytest.fixture
def restored_logging() -> Iterator[None]:
    root = logging.getLogger()
    before = root.handlers[:], root.level, logging.raiseExceptions
    yield
    logging.captureWarnings(capture=False)
    root.handlers[:], logging.raiseExceptions = before[0], before[2]
    root.setLevel(before[1])


def test_text() -> None:
    line = TextFormatter().format(record("ready", logging.WARNING))
    assert line.endswith(":00:00.000 warning ready")


@pytest.mark.parametrize(
    ("level", "priority"),
    [
        (logging.CRITICAL, 2),
        (logging.ERROR, 3),
        (logging.WARNING, 4),
        (logging.INFO, 6),
        (logging.DEBUG, 7),
    ],
)
def test_journal_priorities(level: int, priority: int) -> None:
    assert JournalFormatter().format(record("ready", level)) == f"<{priority}>ready"


def test_json_has_stable_fields() -> None:
    fields = json.loads(JsonFormatter().format(record(FORGED, traceback=True)))
    assert fields.pop("traceback").startswith("Traceback")
    assert fields == {
        "time": "1970-01-01T00:00:00.000Z",
        "level": "info",
        "logger": "session",
        "message": FORGED,
    }


@given(st.text(), st.sampled_from((TextFormatter, JournalFormatter, JsonFormatter)))
def test_a_message_is_one_line_whatever_is_in_it(
    message: str, formatter: type[logging.Formatter]
) -> None:
    line = formatter().format(record(message))
    assert len(line.splitlines()) == 1
    assert line.isprintable()
    line.encode()


def test_each_line_of_a_traceback_has_its_priority() -> None:
    lines = JournalFormatter().format(record("failed", logging.ERROR, traceback=True)).split("\n")
    assert len(lines) > 3
    assert all(line.startswith("<3>") and line.isprintable() for line in lines)


@pytest.mark.usefixtures("restored_logging")
def test_a_stream_that_fails_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.StringIO):
        def write(self, _: str) -> int:
            raise OSError(28, "No space left on device")

        def fileno(self) -> int:
            return 2

    monkeypatch.setattr("sys.stderr", Full())
    log.set_up("info", LogFormat.TEXT)
    logging.getLogger("x").error("lost")


@pytest.mark.usefixtures("restored_logging")
def test_the_journal_is_recognised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "stream"
    with path.open("w") as stream:
        status = os.fstat(stream.fileno())
        monkeypatch.setattr("sys.stderr", stream)
        monkeypatch.setenv("JOURNAL_STREAM", f"{status.st_dev}:{status.st_ino}")
        log.set_up("warning", None)
        logging.getLogger("x").warning("told")
        logging.getLogger("x").info("not told")
        monkeypatch.setenv("JOURNAL_STREAM", f"{status.st_dev}:{status.st_ino + 1}")
        log.set_up("info", None)
        logging.getLogger("x").info("text")
    first, second = path.read_text().splitlines()
    assert first == "<4>told"
    assert second.endswith(" info text")
