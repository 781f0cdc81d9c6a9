"""Which engine speaks vfio-user: ours, or libvfio-user for who already builds on that.

``vfio_user_virtio.libvfio_user.session`` has a table of the differences.  The library is looked for
only if it is wanted, and before anything is served.
"""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Final

from vfio_user_virtio.errors import HostError

if TYPE_CHECKING:
    import argparse
    import socket

    from vfio_user_virtio.device import Device
    from vfio_user_virtio.transport.listener import MakeSession, Serving

_log: Final = logging.getLogger(__name__)

NATIVE: Final = "native"
LIBVFIO_USER: Final = "libvfio-user"


def add_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--engine",
        choices=(NATIVE, LIBVFIO_USER),
        default=NATIVE,
        help="what speaks vfio-user (default: native)",
    )
    group.add_argument(
        "--libvfio-user",
        metavar="PATH",
        help="the library (default: as LIBVFIO_USER says, or where the loader finds it)",
    )


def chosen(options: argparse.Namespace) -> MakeSession | None:
    """What makes sessions, None for our own engine.  Raises HostError."""
    path = options.libvfio_user
    if options.engine == NATIVE:
        if path is not None:
            raise HostError(
                f"--libvfio-user is for --engine {LIBVFIO_USER}; add that", exit_code=os.EX_USAGE
            )
        return None

    from vfio_user_virtio.libvfio_user import load
    from vfio_user_virtio.libvfio_user.session import LibvfioUserSession

    library = load(path)
    _log.info("engine: libvfio-user, %s", library.path)

    def make_session(sock: socket.socket, device: Device, name: str) -> Serving:
        return LibvfioUserSession(library, sock, device, name=name)

    return make_session
