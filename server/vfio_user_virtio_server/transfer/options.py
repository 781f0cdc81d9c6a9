"""What ``send`` and ``receive`` have in common on the command line: which device, which time."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

from vfio_user_virtio.control.client import control_of
from vfio_user_virtio.errors import HostError
from vfio_user_virtio.limits import TRANSFER_SECONDS
from vfio_user_virtio.transport.migration_end import ANSWER_SECONDS
from vfio_user_virtio_server import values
from vfio_user_virtio_server.arguments import argument
from vfio_user_virtio_server.dial import dial, session
from vfio_user_virtio_server.transfer.control_ends import ControlSource, ControlTarget
from vfio_user_virtio_server.transfer.ends import SocketSource, SocketTarget

if TYPE_CHECKING:
    import argparse
    from collections.abc import AsyncIterator

    from vfio_user_virtio.control.client import ControlClient
    from vfio_user_virtio_server.transfer.ends import Source, Target


def add_arguments(parser: argparse.ArgumentParser, direction: str, side: str) -> None:
    """``--from-socket`` and its kind, or ``--to-socket``."""
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument(
        f"--{direction}-socket",
        metavar="PATH",
        dest="socket",
        type=argument(values.parse_socket_path),
        help=f"socket of the {side}, which is free",
    )
    where.add_argument(
        f"--{direction}-control",
        metavar="PATH",
        dest="control",
        type=argument(values.parse_socket_path),
        help=f"control socket of the {side}'s server; a VM may be using the device",
    )
    parser.add_argument(
        "--device", metavar="NAME", help="which of its devices (default: the only one)"
    )
    parser.add_argument(
        "--timeout",
        metavar="SECONDS",
        type=argument(values.parse_seconds),
        default=ANSWER_SECONDS,
        help=f"how long the server may take for one answer (default: {ANSWER_SECONDS:g})",
    )
    parser.add_argument(
        "--peer-timeout",
        metavar="SECONDS",
        type=argument(values.parse_seconds),
        default=TRANSFER_SECONDS,
        help=f"how long the other end may be silent (default: {TRANSFER_SECONDS:g})",
    )


@contextlib.asynccontextmanager
async def open_source(options: argparse.Namespace) -> AsyncIterator[Source]:
    """The device to be sent.  Raises HostError."""
    if options.socket is not None:
        async with session(options.socket) as client:
            yield SocketSource(client, options.socket, options.timeout)
    else:
        async with control_of(await dial(options.control)) as client:
            name = await _device(options, client)
            yield ControlSource(client, name, options.timeout)


@contextlib.asynccontextmanager
async def open_target(options: argparse.Namespace) -> AsyncIterator[Target]:
    """The device to be loaded.  Raises HostError."""
    if options.socket is not None:
        async with session(options.socket) as client:
            yield SocketTarget(client, options.socket, options.timeout)
    else:
        async with control_of(await dial(options.control)) as client:
            name = await _device(options, client)
            yield ControlTarget(client, name, options.timeout)


async def _device(options: argparse.Namespace, client: ControlClient) -> str:
    names = [device.name for device in await client.devices()]
    if options.device is None and len(names) == 1:
        return names[0]
    if options.device not in names:
        raise HostError(
            f"{options.control} serves {', '.join(names)}; name one of them with --device",
            exit_code=os.EX_USAGE,
        )
    return str(options.device)
