"""Where libvfio-user is, and whether it is one that these bindings fit.

The library has releases but no function that tells its version, its soname says 0 whatever changes,
and its header warns that API and ABI may change at any time.  So `load` looks at what can be seen:
that every function is there, by name; that a scatter-gather entry has a size; and, with a context
and a client of our own in a temporary folder, how those two calls behave whose meaning has changed
under an old name.  That takes a millisecond, and calls nothing with arguments that another ABI
would take for a pointer.

- `vfu_setup_device_migration_callbacks` must know version 2 (since September 2023).
- `vfu_setup_device_dma` takes the greatest number of regions since March 2026.  Asked for 0
  regions, the newer library refuses the first one; the older one takes 0 for "no callback".

Nothing of the library is part of this project, nor fetched or built by it.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import tempfile
from pathlib import Path
from typing import Any, Final, TypeAlias

import attrs
import cffi

from vfio_user_virtio.errors import ConnectionLost, HostError
from vfio_user_virtio.libvfio_user import callbacks
from vfio_user_virtio.libvfio_user.declarations import (
    DECLARATIONS,
    DEVICE_PCI,
    FUNCTIONS,
    LIMITED_DMA,
    MIGRATION_VERSION,
    NON_BLOCKING,
    TRANSPORT_SOCKET,
    UNLIMITED_DMA,
)
from vfio_user_virtio.protocol.header import (
    ERROR,
    Command,
    decode_header_untrusted,
    encode_command,
)

Native: TypeAlias = Any
"""A function, pointer or structure as cffi makes it of the declarations, which mypy cannot read.
None of them leaves this package, except for who asks for `Library.lib` or `Context.handle`."""

VARIABLE: Final = "LIBVFIO_USER"
"""The environment variable that names the library."""

_NAME: Final = "libvfio-user.so.0"
_UNNAMED: Final = f"neither --libvfio-user nor {VARIABLE} is given"
_SG_SIZES: Final = range(16, 257)
_VERSION: Final = encode_command(1, Command.VERSION, struct.pack("<HH", 0, 0))
_DMA_MAP: Final = encode_command(2, Command.DMA_MAP, struct.pack("<IIQQQ", 32, 3, 0, 0, 0x1000))
_INSTALL: Final = (
    "install libvfio-user (https://github.com/nutanix/libvfio-user, or a package of your "
    f"distribution), or name it with --libvfio-user PATH or the variable {VARIABLE}"
)


class LibraryError(HostError):
    """There is no libvfio-user, or one that does not fit; the message says what to install."""

    def __init__(self, message: str) -> None:
        super().__init__(message, exit_code=os.EX_UNAVAILABLE)


class LibraryMissing(LibraryError):
    """No library was named, and the loader knows none: libvfio-user is not installed."""


@attrs.frozen(eq=False)
class Library:
    """A loaded library: `lib` has its functions, `ffi` their types, `path` is as it was asked for.

    `limits_dma`: whether `vfu_setup_device_dma` takes the greatest number of regions.
    `sg_size`: bytes of one scatter-gather entry.
    """

    path: str
    ffi: Native
    lib: Native
    limits_dma: bool
    sg_size: int


def wanted(path: str | None = None) -> tuple[str, str]:
    """Which library to load, and who says so: `path`, the variable, or else the loader."""
    if path is not None:
        return path, "--libvfio-user"
    if told := os.environ.get(VARIABLE):
        return told, f"environment variable {VARIABLE}"
    return _NAME, _UNNAMED


def load(path: str | None = None) -> Library:
    """Load libvfio-user, see `wanted`, and look whether it fits.

    Raises LibraryError, namely LibraryMissing where none was asked for by name and none is there.
    """
    name, why = wanted(path)
    ffi = _ffi(LIMITED_DMA)
    try:
        lib = ffi.dlopen(name)
    except OSError as error:
        reason = str(error).partition("  Additionally")[0].rstrip(".")  # which cffi tries in vain
        # Not so if what it names is a library that this one needs.
        absent = reason.endswith(os.strerror(errno.ENOENT)) and f"{name}: " in reason
        missing_or_unfit = LibraryMissing if absent and why == _UNNAMED else LibraryError
        raise missing_or_unfit(f"{why}: {reason}; {_INSTALL}") from None
    missing = [function for function in FUNCTIONS if not hasattr(lib, function)]
    if missing:
        if len(missing) == len(FUNCTIONS):
            raise LibraryError(f"{why}: {name} is not libvfio-user; {_INSTALL}")
        raise LibraryError(
            f"{why}: {name} is a version that does not fit: it has no {', '.join(missing)}; "
            f"{_INSTALL}"
        )
    sg_size: int = lib.dma_sg_size()
    if sg_size not in _SG_SIZES:
        raise LibraryError(f"{name}: dma_sg_size() is {sg_size}; {_INSTALL}")
    limits_dma = _probe(name, ffi, lib)
    if not limits_dma:
        ffi = _ffi(UNLIMITED_DMA)
        lib = ffi.dlopen(name)
    return Library(name, ffi, lib, limits_dma, sg_size)


def _ffi(dma: str) -> Native:
    ffi = cffi.FFI()
    ffi.cdef(DECLARATIONS + dma)
    return ffi


def _probe(name: str, ffi: Native, lib: Native) -> bool:
    """Whether the library limits DMA regions.  Raises LibraryError for one that cannot be used."""
    entry_points = callbacks.EntryPoints()
    callback = entry_points.make(callbacks.RESET, lambda _: 0)
    data = entry_points.make(callbacks.DATA, lambda _address, _count: 0)
    with tempfile.TemporaryDirectory(prefix="vfio-user-virtio-") as folder:
        path = str(Path(folder, "probe"))
        context = lib.vfu_create_ctx(
            TRANSPORT_SOCKET, path.encode(), NON_BLOCKING, ffi.NULL, DEVICE_PCI
        )
        if not context:
            raise _unusable(name, "vfu_create_ctx", ffi.errno)
        try:
            table = ffi.new("vfu_migration_callbacks_t *")
            table.version = MIGRATION_VERSION
            table.transition = ffi.cast("void *", callback)
            table.read_data = table.write_data = ffi.cast("void *", data)
            if lib.vfu_setup_device_migration_callbacks(context, table) < 0:
                raise LibraryError(
                    f"{name} is too old: it knows no migration callbacks of version "
                    f"{MIGRATION_VERSION}, which came in September 2023; {_INSTALL}"
                )
            if lib.vfu_setup_device_dma(context, 0, ffi.NULL, ffi.NULL) < 0:
                raise _unusable(name, "vfu_setup_device_dma", ffi.errno)
            if lib.vfu_realize_ctx(context) < 0:
                raise _unusable(name, "vfu_realize_ctx", ffi.errno)
            return _first_map_is_refused(name, path, ffi, lib, context)
        finally:
            lib.vfu_destroy_ctx(context)


def _first_map_is_refused(name: str, path: str, ffi: Native, lib: Native, context: Native) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        client.setblocking(False)
        try:
            client.connect(path)
            client.sendall(_VERSION + _DMA_MAP)
            for step in ("vfu_attach_ctx", "vfu_run_ctx"):
                if getattr(lib, step)(context) < 0:
                    raise _unusable(name, step, ffi.errno)
            answers = client.recv(4096)
            answer = decode_header_untrusted(answers, decode_header_untrusted(answers).size)
        except OSError as error:
            raise _unusable(name, "a first conversation", error.errno or errno.EIO) from None
        except ConnectionLost:
            raise _unusable(name, "a first conversation", errno.EPROTO) from None
    if answer.command != Command.DMA_MAP:
        raise _unusable(name, "a first conversation", errno.EPROTO)
    return bool(answer.flags & ERROR)


def _unusable(name: str, step: str, code: int) -> LibraryError:
    return LibraryError(f"{name} cannot be used: {step} fails with {os.strerror(code)}; {_INSTALL}")
