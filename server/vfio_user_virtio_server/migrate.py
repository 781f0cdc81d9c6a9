"""``vfio-user-virtio migrate``: move a device's state from one server to another, and time it.

It is the client of both servers for as long as it takes.  A device serves one client, so one that a
VM uses cannot be migrated this way: this is for trying a pair of servers, for measurements, and a
model for tools that own the sockets (`transport.device_migration` does the work).  Guest memory is
not moved, and when the command ends so do both sessions; the state stays in the target's member,
for its next client.

A target that would refuse what the source has is found out beforehand, as far as the two images
tell (`migration.preflight`): the names are in the error, and the source runs on.

Ctrl-C and SIGTERM cancel: the target is reset, the source runs on.  Once the target runs it is too
late for that.

``--json`` prints one object: ``from``, ``to``, ``precopy`` (whether there was a PRE_COPY phase),
``from_options`` and ``to_options`` (what the devices offer, by name), ``phases`` (each with
``name``, ``seconds`` and ``byte_count``), ``seconds``, ``downtime_seconds``, ``byte_count``,
``source_state``, ``image``.  These keys are stable.
"""

from __future__ import annotations

import contextlib
import json
import os
from typing import TYPE_CHECKING, Final

import attrs

from vfio_user_virtio.errors import HostError
from vfio_user_virtio.migration.preflight import Preflight
from vfio_user_virtio.protocol.migration import MigrationState
from vfio_user_virtio.transport.device_migration import DOWNTIME, Migration
from vfio_user_virtio.transport.migration_end import ANSWER_SECONDS
from vfio_user_virtio_server import log, report, values
from vfio_user_virtio_server.arguments import argument
from vfio_user_virtio_server.cancellable import CancelledBySignal, run_cancellable
from vfio_user_virtio_server.dial import session
from vfio_user_virtio_server.progress import ProgressLine
from vfio_user_virtio_server.report import Report
from vfio_user_virtio_server.spans import Span

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator

    from vfio_user_virtio.protocol.migration import MigrationFlags
    from vfio_user_virtio_server.cancellable import Cancellable

MAX_ROUNDS: Final = 3600


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Move the state of a device from one server to another and say how long each phase took. "
        "Guest memory is not moved.  Both devices must be free: a device serves one client, so one "
        "that a VM uses cannot be migrated this way.  The state stays in the target's member for "
        "its next client, until one resets it.  Devices that do not fit are refused by name, and "
        "the source runs on."
    )
    for option, what in (("--from-socket", "source"), ("--to-socket", "target")):
        parser.add_argument(
            option,
            metavar="PATH",
            required=True,
            type=argument(values.parse_socket_path),
            help=f"socket of the {what}",
        )
    add_source_arguments(parser)
    parser.add_argument(
        "--image",
        metavar="FILE",
        help="save the stream there, for `image show`; if the migration fails, as far as it came",
    )
    parser.add_argument(
        "--timeout",
        metavar="SECONDS",
        type=argument(values.parse_seconds),
        default=ANSWER_SECONDS,
        help=f"how long a server may take for one answer (default: {ANSWER_SECONDS:g})",
    )


def add_source_arguments(parser: argparse.ArgumentParser) -> None:
    """How the source is treated and what is told of it, for `send` too."""
    parser.add_argument(
        "--no-precopy", action="store_true", help="stop the source before anything is saved"
    )
    parser.add_argument(
        "--rounds",
        metavar="N",
        type=argument(parse_rounds),
        default=0,
        help="look N times for what has changed before the source is stopped, once a second",
    )
    parser.add_argument(
        "--keep-source", action="store_true", help="let the source run on; otherwise it is stopped"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--report",
        metavar="FILE",
        type=argument(report.check_path),
        help="draw a time line of the phases there, as .html or .svg, also if it fails",
    )


def run(options: argparse.Namespace) -> int:
    if options.from_socket == options.to_socket:
        raise HostError("--from-socket and --to-socket are the same", exit_code=os.EX_USAGE)
    attempt = Attempt(options)
    with report.kept(options.report, attempt.drawn):
        run_cancellable(attempt.run, lambda: attempt.standing, lambda: attempt.too_late)
        done = attempt.migration
        assert done is not None
        if options.json:
            print(json.dumps(described(options, done), indent=2))
        else:
            print(*(log.escape(line) for line in lines(options, done)), sep="\n")
    return os.EX_OK


class Attempt:
    """The one migration that `options` ask for; `migration` is there once both ends answer."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.migration: Migration | None = None
        self._options = options

    def drawn(self, failure: HostError | None) -> Report:
        """For `report`; the phases follow on one another."""
        options, migration = self._options, self.migration
        spans: list[Span] = []
        for phase in [] if migration is None else migration.phases:
            start = spans[-1].end if spans else 0.0
            down = phase.name in DOWNTIME
            spans.append(Span(phase.name, start, phase.seconds, phase.byte_count, down=down))
        if failure is not None and spans:
            cancelled = isinstance(failure, CancelledBySignal)
            spans[-1].undone = "cancelled" if cancelled else "failed"
        title = f"{options.from_socket} to {options.to_socket}"
        return Report(title, spans, failure=str(failure or ""))

    @property
    def too_late(self) -> bool:
        return self.migration is not None and self.migration.target_runs

    @property
    def standing(self) -> str:
        """Where the device is now."""
        migration = self.migration
        if migration is None:
            return "nothing was changed"
        if migration.target_runs:
            return f"the target runs, the source is in {_state(migration)}"
        if migration.source_state is MigrationState.RUNNING:
            return "the source runs on"
        return f"the source does not run on, its state is {_state(migration)}"

    async def run(self, cancellable: Cancellable) -> None:
        options = self._options
        async with contextlib.AsyncExitStack() as stack:
            source = await stack.enter_async_context(session(options.from_socket))
            target = await stack.enter_async_context(session(options.to_socket))
            progress = ProgressLine()
            stack.callback(progress.clear)
            self.migration = Migration(
                source,
                target,
                precopy=not options.no_precopy,
                rounds=options.rounds,
                keep_source=options.keep_source,
                answer_seconds=options.timeout,
                on_data=_saver(options.image, stack),
                on_progress=lambda m: progress.show(m.phases[-1].name, m.byte_count),
                preflight=Preflight(),
            )
            # Not the sessions as well: the way back needs them.
            with cancellable.inner():
                await self.migration.run()


def _saver(
    path: str | None, stack: contextlib.AsyncExitStack
) -> Callable[[bytes | memoryview], None]:
    """What writes the stream to a new file, which only its owner can read."""
    if path is None:
        return lambda _: None
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise HostError(
            f"cannot save the stream in {path}: {error.strerror}", exit_code=os.EX_CANTCREAT
        ) from None
    stack.callback(os.close, fd)

    def save(data: bytes | memoryview) -> None:
        left = memoryview(data)
        try:
            while left:
                left = left[os.write(fd, left) :]
        except OSError as error:
            raise HostError(
                f"cannot save the stream in {path}: {error.strerror}", exit_code=os.EX_IOERR
            ) from None

    return save


# --- the report ---------------------------------------------------------------------------------


def described(options: argparse.Namespace, done: Migration) -> dict[str, object]:
    """For programs."""
    return {
        "from": options.from_socket,
        "to": options.to_socket,
        "precopy": done.precopy,
        "from_options": _names(done.source_options),
        "to_options": _names(done.target_options),
        "phases": [attrs.asdict(phase) for phase in done.phases],
        "seconds": done.seconds,
        "downtime_seconds": done.downtime,
        "byte_count": done.byte_count,
        "source_state": _state(done),
        "image": options.image,
    }


def lines(options: argparse.Namespace, done: Migration) -> Iterator[str]:
    """For people."""
    yield (
        f"{options.from_socket} to {options.to_socket}: {done.byte_count:,} bytes in "
        f"{_ms(done.seconds)}, downtime {_ms(done.downtime)}"
    )
    for phase in done.phases:
        moved = f"  {phase.byte_count:,} bytes" if phase.byte_count else ""
        yield f"    {phase.name:<10}{_ms(phase.seconds):>12}{moved}"
    for side, options_of in (("source", done.source_options), ("target", done.target_options)):
        yield f"    The {side} offers {' '.join(_names(options_of))}"
    yield f"    The target runs, the source is in {_state(done)}; guest memory was not moved"
    yield "    The state stays in the target's member for its next client, until one resets it"


def _state(migration: Migration) -> str:
    return "unknown" if migration.source_state is None else migration.source_state.name


def _names(options: MigrationFlags) -> list[str]:
    return [flag.name or "" for flag in type(options) if flag in options]


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.2f} ms"


def parse_rounds(text: str) -> int:
    """How often to look for more in PRE_COPY.  Raises ValueError."""
    number = values.parse_number(text)
    if not 0 <= number <= MAX_ROUNDS:
        raise ValueError(f"{text} rounds; they can be 0 to {MAX_ROUNDS}, one a second")
    return number
