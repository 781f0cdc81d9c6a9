"""The order of accesses to shared rings: a full barrier, and one that keeps like with like.

After the device publishes an index it reads what the driver wrote about notifications, and the
driver does the same the other way round.  If either store may pass the following load, both sides
can decide that the other is awake (virtio 1.4, Split Virtqueues, Available/Used Buffer
Notification Suppression).  x86 reorders exactly that pair, so two places in a ring need
`full_barrier`.  Everywhere else `order_accesses` is enough, which is nothing on x86-64.

Python has no fence.  On x86-64 every atomic read-modify-write is a full barrier, and taking an
uncontended ``threading.Lock`` is one, at the price of a foreign call and with no library to be
missing.  It is taken by ``with``, which no signal handler can come into: calling its methods would
be quicker, but a KeyboardInterrupt between them would leave the lock taken for ever.  Elsewhere
libatomic's fence is called through cffi.
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
        with lock:
            pass

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


def ordering_for(machine: str) -> Callable[[], object]:
    """What keeps loads in order with loads and stores with stores: on x86-64, nothing needs to."""
    return _nothing if machine == "x86_64" else choose_barrier(machine)


def _nothing() -> None:
    pass


full_barrier: Final = choose_barrier(platform.machine())
"""Order every store before this call ahead of every load after it."""

order_accesses: Final = ordering_for(platform.machine())
"""Order every load before this call ahead of those after it, and every store likewise."""
