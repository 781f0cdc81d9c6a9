"""``vfio-user-virtio send``: a device's state goes to another host, by whatever pipe leads there.

    vfio-user-virtio send --from-socket A -- ssh host vfio-user-virtio receive --to-socket B
    vfio-user-virtio send --from-socket A | ssh host vfio-user-virtio receive --to-socket B
    vfio-user-virtio send --from-socket A --connect /run/forwarded.sock

The first runs a program and has a way back: the receiver is asked before the source is stopped,
and the source let go of only when the target runs.  The second has none: the source stays stopped
at the end of the stream, and only the exit code of ``receive`` tells whether the target runs.

The device is one that is free (``--from-socket``: it is the server's client), or one that a VM uses
(``--from-control``); then whoever moves the VM stops it first, and pages that the device has
written go with it if the server logs them.

Who may write to the pipe may load the target, and who can read it sees guest memory: it is for the
pipe (ssh) to keep others out.

``--json`` prints one object: ``name``, ``target_name``, ``precopy``, ``phases`` (each with
``name``, ``seconds``, ``byte_count``, ``page_count``), ``seconds``, ``downtime_seconds``,
``byte_count``, ``page_bytes``, ``target_runs`` (false without a way back: not known),
``source_state``.  These keys are stable.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from typing import TYPE_CHECKING, TextIO

from vfio_user_virtio.errors import HostError
from vfio_user_virtio.migration.transfer_stream import BACKWARD
from vfio_user_virtio.protocol.migration import MigrationState
from vfio_user_virtio_server import log, report, values
from vfio_user_virtio_server.arguments import argument
from vfio_user_virtio_server.cancellable import run_cancellable
from vfio_user_virtio_server.migrate import add_source_arguments
from vfio_user_virtio_server.progress import ProgressLine
from vfio_user_virtio_server.report import Report
from vfio_user_virtio_server.transfer import options as ends_of
from vfio_user_virtio_server.transfer.address import parse_address
from vfio_user_virtio_server.transfer.channel import (
    Channel,
    command_streams,
    connected,
    fd_streams,
    is_socket,
)
from vfio_user_virtio_server.transfer.sender import Sending
from vfio_user_virtio_server.words import duration

if TYPE_CHECKING:
    import argparse
    from collections.abc import AsyncIterator, Iterator

    from vfio_user_virtio_server.cancellable import Cancellable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Send the state of a device to `receive` at another host.  The stream goes to a program "
        "that is named last, behind --, to a socket, or else to standard output, without a way "
        "back.  The pipe must keep others out, as ssh does: nothing is encrypted or signed here."
    )
    ends_of.add_arguments(parser, "from", "source")
    parser.add_argument(
        "program",
        metavar="PROGRAM",
        nargs="*",
        help="run this, and speak with it by its standard input and output",
    )
    way = parser.add_mutually_exclusive_group()
    way.add_argument(
        "--connect",
        metavar="ADDRESS",
        type=argument(parse_address),
        help="connect to a receiver: the path of a UNIX socket, or HOST:PORT",
    )
    way.add_argument(
        "--fd",
        metavar="N",
        type=argument(values.parse_fd),
        help="a pipe, or a socket that is connected to a receiver",
    )
    add_source_arguments(parser)


def run(options: argparse.Namespace) -> int:
    if options.program and (options.connect is not None or options.fd is not None):
        raise HostError("a program as well as --connect or --fd", exit_code=os.EX_USAGE)
    to_output = not options.program and options.connect is None and options.fd is None
    if to_output and sys.stdout.isatty():
        raise HostError(
            "the stream would go to this terminal; name a program behind --, or write to a pipe",
            exit_code=os.EX_USAGE,
        )
    attempt = Attempt(options)
    with report.kept(options.report, attempt.drawn):
        run_cancellable(attempt.run, lambda: attempt.standing, lambda: attempt.too_late)
        done = attempt.sending
        assert done is not None
        _print(options, attempt, done, sys.stderr if to_output else sys.stdout)
    return os.EX_OK


class Attempt:
    """The one sending that `options` ask for; `sending` is there once source and pipe are."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.sending: Sending | None = None
        self._options = options

    @property
    def too_late(self) -> bool:
        """Whether the target has been told to run."""
        return self.sending is not None and self.sending.word_is_out

    @property
    def standing(self) -> str:
        """Where the device is now."""
        sending = self.sending
        if sending is None:
            return "nothing was changed"
        state = sending.source.state
        named = "unknown" if state is None else state.name
        if sending.target_runs:
            return f"the target runs, the source is in {named}"
        if state is MigrationState.RUNNING:
            return "the source runs on"
        if sending.word_is_out:
            return (
                f"it is not known whether the target runs, so the source stays in {named}; "
                "look at the target, and reset the source only if the target does not run"
            )
        return f"the source does not run on, its state is {named}"

    def drawn(self, failure: HostError | None) -> Report:
        """For `report`."""
        done = self.sending
        why = str(failure or "")
        if done is None:
            return Report("A device is sent", [], failure=why)
        return Report(f"{_name(done)} to {_target(done)}", done.spans, failure=why)

    async def run(self, cancellable: Cancellable) -> None:
        options = self._options
        async with contextlib.AsyncExitStack() as stack:
            source = await stack.enter_async_context(ends_of.open_source(options))
            channel = await stack.enter_async_context(_channel(options))
            progress = ProgressLine()
            stack.callback(progress.clear)
            self.sending = Sending(
                source,
                channel,
                precopy=not options.no_precopy,
                rounds=options.rounds,
                keep_source=options.keep_source,
                on_progress=lambda s: progress.show(s.spans[-1].name, s.byte_count, s.page_bytes),
            )
            # Not the source and the pipe as well: the way back needs them.
            with cancellable.inner():
                await self.sending.run()


@contextlib.asynccontextmanager
async def _channel(options: argparse.Namespace) -> AsyncIterator[Channel]:
    seconds = options.peer_timeout
    if options.program:
        async with command_streams(options.program) as (incoming, outgoing):
            yield Channel(incoming, outgoing, BACKWARD, seconds=seconds)
    elif options.connect is not None:
        async with connected(options.connect) as stream:
            yield Channel(stream, stream, BACKWARD, seconds=seconds)
    else:
        fd = 1 if options.fd is None else options.fd
        async with fd_streams(fd if is_socket(fd) else None, fd) as (source, target):
            yield Channel(source, target, BACKWARD, seconds=seconds)


# --- the result ---------------------------------------------------------------------------------


def _print(options: argparse.Namespace, attempt: Attempt, done: Sending, to: TextIO) -> None:
    if options.json:
        print(json.dumps(described(done), indent=2), file=to)
    else:
        print(*(log.escape(line) for line in lines(attempt, done)), sep="\n", file=to)


def described(done: Sending) -> dict[str, object]:
    """For programs."""
    state = done.source.state
    return {
        "name": _name(done),
        "target_name": None if done.target_facts is None else done.target_facts.name,
        "precopy": done.precopy,
        "phases": [
            {
                "name": span.name,
                "seconds": span.seconds,
                "byte_count": span.byte_count,
                "page_count": span.page_count,
            }
            for span in done.spans
        ],
        "seconds": done.seconds,
        "downtime_seconds": done.downtime,
        "byte_count": done.byte_count,
        "page_bytes": done.page_bytes,
        "target_runs": done.target_runs,
        "source_state": "unknown" if state is None else state.name,
    }


def lines(attempt: Attempt, done: Sending) -> Iterator[str]:
    """For people."""
    pages = f" and {done.page_bytes:,} of guest memory" if done.page_bytes else ""
    yield (
        f"{_name(done)} to {_target(done)}: {done.byte_count:,} bytes{pages} in "
        f"{duration(done.seconds)}, downtime {duration(done.downtime)}"
    )
    for span in done.spans:
        moved = f"  {span.byte_count:,} bytes" if span.byte_count else ""
        yield f"    {span.name:<10}{duration(span.seconds):>12}{moved}"
    if done.channel.answers:
        yield f"    {attempt.standing[0].upper()}{attempt.standing[1:]}"
    else:
        state = done.source.state
        named = "unknown" if state is None else state.name
        yield f"    The source is in {named}; whether the target runs, its receiver knows"


def _name(done: Sending) -> str:
    return "?" if done.source_facts is None else done.source_facts.name


def _target(done: Sending) -> str:
    return "the stream's end" if done.target_facts is None else done.target_facts.name
