"""Functions of ours that libvfio-user calls: one native entry point for each kind of callback.

The bindings are cffi's, except for these entry points, which are ctypes' closures.  Three ways were
tried in a process that denies itself writable-executable memory (PR_SET_MDWE, which is what
MemoryDenyWriteExecute= of our hardened unit amounts to), with CPython 3.11, cffi 2.1, libffi 3.4:

- cffi's `ffi.callback` makes its closures in memory that is writable and executable, always:
  MemoryError.
- cffi's `extern "Python"` needs no such memory, but a compiler wherever this library is installed,
  or one wheel for each interpreter and machine; this library is pure Python, and a module compiled
  at run time into a cache is what a hardened service must not load.
- ctypes' closures come from libffi's own allocator, which maps a file twice, once to write and once
  to execute, or uses trampolines in its text, wherever the first way is denied: they work, and
  ``/proc/self/maps`` has no mapping that is both.  A test repeats this measurement.

An entry point belongs to a context, is made once, and lives as long as the context.  What it calls
may raise OSError: the library gets -1 and that errno.  Any other exception is kept, the library
gets EIO, and the exception comes out of the call of the library in which it happened.
"""

from __future__ import annotations

import ctypes
import errno
from typing import TYPE_CHECKING, Final, ParamSpec, Protocol, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Callable

    from vfio_user_virtio.libvfio_user.declarations import MigrationState

_P = ParamSpec("_P")

EntryKind: TypeAlias = "type[ctypes._CFunctionType]"
"""One of the kinds below: what is passed and returned."""

_CTX: Final = ctypes.c_void_p

LOG: Final = ctypes.CFUNCTYPE(None, _CTX, ctypes.c_int, ctypes.c_char_p, use_errno=True)
ACCESS: Final = ctypes.CFUNCTYPE(
    ctypes.c_ssize_t,
    _CTX,
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_longlong,
    ctypes.c_bool,
    use_errno=True,
)
RESET: Final = ctypes.CFUNCTYPE(ctypes.c_int, _CTX, ctypes.c_int, use_errno=True)
QUIESCE: Final = ctypes.CFUNCTYPE(ctypes.c_int, _CTX, use_errno=True)
DMA: Final = ctypes.CFUNCTYPE(None, _CTX, ctypes.c_void_p, use_errno=True)
IRQ_STATE: Final = ctypes.CFUNCTYPE(
    None, _CTX, ctypes.c_uint32, ctypes.c_uint32, ctypes.c_bool, use_errno=True
)
TRANSITION: Final = RESET
DATA: Final = ctypes.CFUNCTYPE(
    ctypes.c_ssize_t, _CTX, ctypes.c_void_p, ctypes.c_uint64, use_errno=True
)


class Migration(Protocol):
    """The device's side of a migration (vfu_migration_callbacks_t); OSError refuses."""

    def transition(self, state: MigrationState) -> None:
        """Go to `state`, one step of the library's state machine."""
        ...

    def read_data(self, count: int) -> bytes | bytearray | memoryview:
        """Up to `count` bytes of device state; none means that there is no more."""
        ...

    def write_data(self, data: memoryview) -> None:
        """Take device state; `data` is valid only during the call."""
        ...


class EntryPoints:
    """The entry points of one context, and what went wrong in them."""

    def __init__(self) -> None:
        self._alive: list[object] = []
        self._failure: BaseException | None = None

    def make(self, kind: EntryKind, function: Callable[_P, int | None]) -> int:
        """The address of an entry point that calls `function` without the context.

        What `function` returns is returned; None is 0.
        """

        def enter(_: int, *args: _P.args, **kwargs: _P.kwargs) -> int:
            try:
                return function(*args, **kwargs) or 0
            except OSError as error:
                ctypes.set_errno(error.errno or errno.EIO)
            except BaseException as error:
                if self._failure is None:
                    self._failure = error
                ctypes.set_errno(errno.EIO)
            return -1

        entry = kind(enter)
        self._alive.append(entry)
        return ctypes.cast(entry, ctypes.c_void_p).value or 0

    def check(self) -> None:
        """Raise what one of them raised since the last call, if anything."""
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure
