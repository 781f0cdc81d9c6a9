"""``vfio-user-virtio receive``: load what ``send`` sends, and let the target run.

The stream comes by standard input and, if the sender takes answers, is answered on standard output;
or by ``--fd``, or by a socket that is listened at for one sender.  See `send`.

The target runs only when all of a stream has come undamaged and, with a way back, the sender has
said so.  In any other case it is reset, and the exit code is not 0.

``--json`` prints one object: ``name``, ``source_name``, ``seconds``, ``byte_count``,
``page_bytes``.  These keys are stable.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from typing import TYPE_CHECKING

from vfio_user_virtio.errors import HostError
from vfio_user_virtio.migration.transfer_stream import FORWARD
from vfio_user_virtio_server import log, values
from vfio_user_virtio_server.arguments import argument
from vfio_user_virtio_server.cancellable import run_cancellable
from vfio_user_virtio_server.progress import ProgressLine
from vfio_user_virtio_server.transfer import options as ends_of
from vfio_user_virtio_server.transfer.address import parse_address
from vfio_user_virtio_server.transfer.channel import Channel, accepted, fd_streams, is_socket
from vfio_user_virtio_server.transfer.receiver import Receiving
from vfio_user_virtio_server.words import duration

if TYPE_CHECKING:
    import argparse
    from collections.abc import AsyncIterator

    from vfio_user_virtio_server.cancellable import Cancellable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Load a device with what `send` sends, from standard input unless told otherwise, and let "
        "it run.  Whoever can write there can load the device: let the pipe keep others out."
    )
    ends_of.add_arguments(parser, "to", "target")
    way = parser.add_mutually_exclusive_group()
    way.add_argument(
        "--listen",
        metavar="ADDRESS",
        type=argument(parse_address),
        help="wait for one sender: the path of a UNIX socket to make, or HOST:PORT",
    )
    way.add_argument(
        "--fd",
        metavar="N",
        type=argument(values.parse_fd),
        help="a pipe, or a socket that is connected to a sender",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> int:
    by_stdio = options.listen is None and options.fd is None
    if by_stdio and sys.stdin.isatty():
        raise HostError(
            "the stream would come from this terminal; read it from a pipe", exit_code=os.EX_USAGE
        )
    attempt = Attempt(options)
    run_cancellable(attempt.run, lambda: attempt.standing, lambda: attempt.too_late)
    done = attempt.receiving
    assert done is not None
    # Standard output is the way back, if the sender has one.
    to = sys.stderr if by_stdio and not done.one_way else sys.stdout
    if options.json:
        print(json.dumps(described(done), indent=2), file=to)
    else:
        pages = f" and {done.page_bytes:,} of guest memory" if done.page_bytes else ""
        line = (
            f"{_source(done)} to {_target(done)}: {done.byte_count:,} bytes{pages} in "
            f"{duration(done.seconds)}; the target runs"
        )
        print(log.escape(line), file=to)
    return os.EX_OK


class Attempt:
    """The one receiving that `options` ask for; `receiving` is there once target and pipe are."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.receiving: Receiving | None = None
        self._options = options

    @property
    def too_late(self) -> bool:
        return self.receiving is not None and self.receiving.target_runs

    @property
    def standing(self) -> str:
        """Where the device is now."""
        receiving = self.receiving
        if receiving is None or not receiving.begun:
            return "nothing was changed"
        if receiving.target_runs:
            return "the target runs"
        if receiving.may_run:
            return "it is not known whether the target runs"
        return "the target was reset"

    async def run(self, cancellable: Cancellable) -> None:
        options = self._options
        async with contextlib.AsyncExitStack() as stack:
            target = await stack.enter_async_context(ends_of.open_target(options))
            channel = await stack.enter_async_context(_channel(options))
            progress = ProgressLine()
            stack.callback(progress.clear)
            self.receiving = Receiving(
                target,
                channel,
                on_progress=lambda r: progress.show("receive", r.byte_count, r.page_bytes),
            )
            with cancellable.inner():
                await self.receiving.run()


@contextlib.asynccontextmanager
async def _channel(options: argparse.Namespace) -> AsyncIterator[Channel]:
    seconds = options.peer_timeout
    if options.listen is not None:
        async with accepted(options.listen) as stream:
            yield Channel(stream, stream, FORWARD, seconds=seconds)
    elif options.fd is not None:
        both = is_socket(options.fd)
        async with fd_streams(options.fd, options.fd if both else None) as (source, target):
            yield Channel(source, target, FORWARD, seconds=seconds)
    else:
        async with fd_streams(0, 1) as (source, target):
            yield Channel(source, target, FORWARD, seconds=seconds)


def described(done: Receiving) -> dict[str, object]:
    """For programs."""
    return {
        "name": _target(done),
        "source_name": _source(done),
        "seconds": done.seconds,
        "byte_count": done.byte_count,
        "page_bytes": done.page_bytes,
    }


def _source(done: Receiving) -> str:
    return "?" if done.source_facts is None else done.source_facts.name


def _target(done: Receiving) -> str:
    return "?" if done.target_facts is None else done.target_facts.name
