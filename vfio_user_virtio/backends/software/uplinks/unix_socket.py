"""Binding a UNIX socket to a path that a dead process may have left behind, and cleaning up.

A path is taken over only if it is a socket that nobody answers on, and is removed at the end only
if it is still the socket that was bound there.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from typing import TYPE_CHECKING

from vfio_user_virtio.errors import HostError

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextlib.contextmanager
def bound_unix_socket(path: str, kind: socket.SocketKind) -> Iterator[socket.socket]:
    """A non-blocking socket of type `kind` bound to `path`.  Raises HostError if it cannot be."""
    with socket.socket(socket.AF_UNIX, kind | socket.SOCK_CLOEXEC) as bound:
        bound.setblocking(False)
        try:
            _remove_stale(path, kind)
            bound.bind(path)
            identity = _identity(path)
        except OSError as error:
            raise HostError(
                f"cannot bind a UNIX socket to {path}: {error.strerror or error}; check that its "
                "folder exists and is ours to write, and that the path has at most 107 bytes",
                exit_code=os.EX_CANTCREAT,
            ) from error
        try:
            yield bound
        finally:
            with contextlib.suppress(OSError):
                if _identity(path) == identity:
                    os.unlink(path)


def _identity(path: str) -> tuple[int, int]:
    status = os.lstat(path)
    return status.st_dev, status.st_ino


def _remove_stale(path: str, kind: socket.SocketKind) -> None:
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(status.st_mode):
        raise HostError(
            f"{path} exists and is not a socket; take another path, or remove it",
            exit_code=os.EX_CANTCREAT,
        )
    with socket.socket(socket.AF_UNIX, kind | socket.SOCK_CLOEXEC) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except BlockingIOError:
            pass  # alive, and its backlog is full
    raise HostError(
        f"another process answers on {path}; end it, or take another path",
        exit_code=os.EX_UNAVAILABLE,
    )
