"""A full memory barrier, for the two places in a split ring that need one.

After the device publishes an index it reads what the driver wrote about notifications, and the
driver does the same the other way round.  If either store may pass the following load, both sides
can decide that the other is awake (virtio 1.4, Split Virtqueues, Available/Used Buffer
Notification Suppression).  x86 reorders exactly that pair.

Python has no fence.  On x86-64 every atomic read-modify-write is a full barrier, and taking an
uncontended ``threading.Lock`` is one, at two thirds of the price of a foreign call and with no
library to be missing.  Elsewhere that is not so, and libatomic's fence is called through cffi.
"""

from __future__ import annotations

import platform
import threading
from typing import TYPE_CHECKING, Final

import cffi

from vfio_user_virtio.errors import HostError

if TYPE_CHECKING:
    from collections.abc import Callable

_SEQ_CST: Final = 5


def _lock_barrier() -> Callable[[], object]:
    lock = threading.Lock()

    def barrier() -> None:
        lock.acquire()
        lock.release()

    return barrier


def _libatomic_barrier(library: str = "libatomic.so.1") -> Callable[[], object]:
    ffi = cffi.FFI()
    ffi.cdef("void atomic_thread_fence(int);")
    try:
        fence: Callable[[int], None] = getattr(ffi.dlopen(library), "atomic_thread_fence")  # noqa: B009
    except (OSError, AttributeError) as error:
        raise HostError(
            f"no memory barrier on {platform.machine()}: {error}; install libatomic (libatomic1)"
        ) from error
    return lambda: fence(_SEQ_CST)


def choose_barrier(machine: str) -> Callable[[], object]:
    """The barrier for `machine` as ``platform.machine`` names it.  Raises HostError if none."""
    return _lock_barrier() if machine == "x86_64" else _libatomic_barrier()


full_barrier: Final = choose_barrier(platform.machine())
"""Order every store before this call ahead of every load after it."""
