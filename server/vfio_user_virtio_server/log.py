"""Log lines: text for people, ``<N>`` priorities for the journal, JSON for collectors.

All go to standard error.  The journal understands the priority prefix of sd-daemon(3), so there is
no need for its native protocol.  Text from clients and guests reaches messages, therefore control
characters are escaped here, once: nobody can forge a line or drive a terminal.

A log that cannot be written (a closed pipe, a full disk) must not end a session: such errors are
dropped, as the standard library does when ``logging.raiseExceptions`` is off.
"""

from __future__ import annotations

import enum
import logging
import os
import sys
from typing import Final

LEVELS: Final = {
    "error": logging.ERROR,
    "warning": logging.WARNING,
    "info": logging.INFO,
    "debug": logging.DEBUG,
}


class LogFormat(enum.Enum):
    TEXT = "text"
    JOURNAL = "journal"
    JSON = "json"


def set_up(level: str, log_format: LogFormat | None) -> None:
    """Send the log to standard error; no format means: the journal's if that is where it goes."""
    if log_format is None:
        log_format = LogFormat.JOURNAL if _is_journal(sys.stderr.fileno()) else LogFormat.TEXT
    formatters: dict[LogFormat, type[logging.Formatter]] = {
        LogFormat.TEXT: TextFormatter,
        LogFormat.JOURNAL: JournalFormatter,
        LogFormat.JSON: JsonFormatter,
    }
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatters[log_format]())
    logging.raiseExceptions = False
    logging.captureWarnings(capture=True)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(LEVELS[level])


def escape(text: str) -> str:
    """`text` with all that is not printable (line ends, controls, surrogates) as escapes."""
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )


class TextFormatter(logging.Formatter):
    """``23:59:59.123 warning vm1: message``; a traceback follows on lines of its own."""

    default_msec_format = "%s.%03d"
    default_time_format = "%H:%M:%S"

    def format(self, record: logging.LogRecord) -> str:
        head = f"{self.formatTime(record)} {record.levelname.lower()} "
        return head + "\n".join(_lines(self, record))


class JournalFormatter(logging.Formatter):
    """Each line starts with ``<N>``, its priority of syslog(3); the journal adds the time."""

    def format(self, record: logging.LogRecord) -> str:
        return "\n".join(f"<{_priority(record)}>{line}" for line in _lines(self, record))


class JsonFormatter(logging.Formatter):
    """One object per line: time (RFC 3339, UTC), level, logger, message, and traceback if any."""

    def format(self, record: logging.LogRecord) -> str:
        import datetime
        import json

        time = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        fields = {
            "time": time.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return json.dumps(fields)


def _lines(formatter: logging.Formatter, record: logging.LogRecord) -> list[str]:
    lines = [escape(record.getMessage())]
    if record.exc_info:
        lines += [escape(line) for line in formatter.formatException(record.exc_info).splitlines()]
    return lines


def _priority(record: logging.LogRecord) -> int:
    """The priority of syslog(3): 2 critical, 3 error, 4 warning, 6 informational, 7 debug."""
    for level, priority in ((50, 2), (40, 3), (30, 4), (20, 6)):
        if record.levelno >= level:
            return priority
    return 7


def _is_journal(fd: int) -> bool:
    """Whether `fd` is the stream that the service manager connected to the journal."""
    try:
        status = os.fstat(fd)
    except OSError:
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"
