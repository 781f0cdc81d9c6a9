"""A migration as a picture: a time line of its phases, what moved in them, and the guest's packets.

From plain data to one file that needs nothing else, an SVG or an HTML page around it: to be sent
with a bug report, or kept beside a run of the tests.  It knows nothing of how the guest was moved,
so every command that moves something can use it.

`picture` draws it.  Rejected: a library for charts (matplotlib and its kind take longer to import
than a guest to move), and scripts in the page (it is opened where scripts are not allowed: mail, CI
artefacts).
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Final

import attrs

from vfio_user_virtio.errors import HostError
from vfio_user_virtio_server import picture

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from vfio_user_virtio_server.pings import Ping
    from vfio_user_virtio_server.spans import Span

SUFFIXES: Final = (".html", ".svg")


@attrs.frozen
class Report:
    """What is drawn, by one clock.

    `facts`: lines of the header, by name.  `failure`: why it was not done.  `left`: when so many
    bytes of memory were still to be sent.  `stopped`: from when to when nothing ran, if that is
    known better than by the spans.
    """

    title: str
    spans: Sequence[Span]
    pings: Sequence[Ping] = ()
    facts: Mapping[str, str] = attrs.field(factory=dict)
    failure: str = ""
    left: Sequence[tuple[float, int]] = ()
    stopped: tuple[float, float] | None = None

    @property
    def zero(self) -> float:
        """When it began; there may be packets from before."""
        return min((span.start for span in self.spans), default=0.0)

    @property
    def start(self) -> float:
        times = [span.start for span in self.spans] + [ping.sent for ping in self.pings]
        return min(times, default=0.0)

    @property
    def end(self) -> float:
        times = [span.end for span in self.spans] + [ping.sent for ping in self.pings]
        return max(times, default=0.0)

    @property
    def down(self) -> tuple[float, float] | None:
        """From when to when nothing ran; None if something always did."""
        if self.stopped is not None:
            return self.stopped
        spans = [span for span in self.spans if span.down]
        if not spans:
            return None
        return min(span.start for span in spans), max(span.end for span in spans)


def check_path(text: str) -> str:
    """A file that `write` takes.  Raises ValueError."""
    if not text.endswith(SUFFIXES):
        raise ValueError(f"{text!r} is no report; its name ends in {' or '.join(SUFFIXES)}")
    return text


def make(path: str) -> None:
    """Make an empty file at `path`, to fail before anything is done.  Raises HostError."""
    try:
        Path(path).touch()
    except OSError as error:
        raise _unwritable(path, error) from None


def write(path: str, report: Report) -> None:
    """Make the file at `path`, in the form that its name asks for.  Raises HostError."""
    text = picture.svg(report) if path.endswith(".svg") else picture.page(report)
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise _unwritable(path, error) from None


@contextlib.contextmanager
def kept(path: str | None, drawn: Callable[[HostError | None], Report]) -> Iterator[None]:
    """Write to `path` what is `drawn` in the end, which is told of the HostError if this fails.

    Nothing without a path.  Raises HostError, before anything is done if `path` cannot be made.
    """
    if path is None:
        yield
        return
    make(path)
    try:
        yield
    except HostError as error:
        try:
            write(path, drawn(error))
        except HostError as second:
            raise HostError(f"{error}; {second}", exit_code=error.exit_code) from None
        raise
    write(path, drawn(None))


def _unwritable(path: str, error: OSError) -> HostError:
    return HostError(
        f"cannot write the report to {path}: {error.strerror}", exit_code=os.EX_CANTCREAT
    )
