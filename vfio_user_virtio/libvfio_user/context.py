"""`Context`: a device behind libvfio-user, from its making to its end.

The methods are the library's functions in the order in which a server needs them: make a context,
describe the device, `realize` it, `attach` a client when `poll_fd` is readable, `run` whenever it
is readable again.  `run` calls back, in the thread that calls it, with plain integers, bytes and
memoryviews; a callback refuses with OSError, whose errno the client is told.  Whatever else a
callback raises comes out of `run`.

Errors of the library are OSError with its errno.  The library is not thread-safe: one thread at a
time may use a context.  It trusts its caller, and ends the process on some wrong calls (assert), so
the checks that it leaves to the caller are here.

Source: libvfio-user.h, whose comments say more of each function.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Final, Self

import attrs

from vfio_user_virtio.libvfio_user import callbacks
from vfio_user_virtio.libvfio_user.declarations import (
    DEVICE_PCI,
    HEADER_NORMAL,
    MAX_DMA_REGIONS,
    MIGRATION_VERSION,
    NON_BLOCKING,
    TRANSPORT_SOCKET,
    CapabilityFlag,
    Irq,
    LogLevel,
    MigrationState,
    PciType,
    Protection,
    Region,
    RegionFlag,
    ResetKind,
)
from vfio_user_virtio.libvfio_user.scatter import ScatterList

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType

    from vfio_user_virtio.libvfio_user.callbacks import EntryKind, Migration
    from vfio_user_virtio.libvfio_user.library import Library, Native

_CONFIG_SIZES: Final = {
    PciType.CONVENTIONAL: 256,
    PciType.PCI_X_1: 256,
    PciType.PCI_X_2: 4096,
    PciType.EXPRESS: 4096,
}


@attrs.frozen
class DmaRegion:
    """Guest memory that the client shares (vfu_dma_info_t), addresses and sizes in bytes.

    `memory` is where it is mapped into this process, None if it cannot be; it is valid until the
    region is unregistered.
    """

    iova: int
    size: int
    protection: Protection
    page_size: int
    memory: memoryview | None


class Context:
    """See the module head.  A context manager; `close` ends it.

    `path` is where the library makes its listening socket; it must not exist, and is removed in the
    end.  `blocking`: whether `attach` and `run` wait; `run` then serves the client until it goes.
    Raises OSError.
    """

    def __init__(
        self, library: Library, path: str | os.PathLike[str], *, blocking: bool = False
    ) -> None:
        self._library = library
        self._ffi = library.ffi
        self._lib = library.lib
        self._entry_points = callbacks.EntryPoints()
        self._config_size = 0
        self._has_dma = False
        self._handle: Native | None = self._lib.vfu_create_ctx(
            TRANSPORT_SOCKET,
            os.fsencode(path),
            0 if blocking else NON_BLOCKING,
            self._ffi.NULL,
            DEVICE_PCI,
        )
        if not self._handle:
            self._handle = None
            raise self._error(f"vfu_create_ctx at {os.fspath(path)}")

    @property
    def library(self) -> Library:
        return self._library

    @property
    def handle(self) -> Native:
        """The vfu_ctx_t, for functions called through `Library.lib`.  ValueError when closed."""
        if self._handle is None:
            raise ValueError("the context is closed")
        return self._handle

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the session, if there is one, and the context; callbacks may be called meanwhile."""
        handle, self._handle = self._handle, None
        if handle is not None:
            self._lib.vfu_destroy_ctx(handle)
            self._entry_points.check()

    # --- what the device is ---------------------------------------------------------------------

    def setup_log(self, log: Callable[[LogLevel, str], None], level: LogLevel) -> None:
        """Have `log` called with each message of the library of at most this `level`."""

        def entry(level: int, message: bytes) -> None:
            log(LogLevel(level), message.decode(errors="replace"))

        self._check(
            "vfu_setup_log",
            self._lib.vfu_setup_log(self.handle, self._make(callbacks.LOG, entry), level),
        )

    def log(self, level: LogLevel, message: str) -> None:
        """Log a message in the library's way, as far as `setup_log` said."""
        text = self._ffi.new("char[]", message.encode())
        self._lib.vfu_log(self.handle, level, b"%s", text)

    def pci_init(self, kind: PciType = PciType.EXPRESS) -> None:
        """Make the configuration space; once, and before all else that is PCI's."""
        result = self._lib.vfu_pci_init(self.handle, kind, HEADER_NORMAL, 0)
        self._check("vfu_pci_init", result)
        self._config_size = _CONFIG_SIZES[kind]

    def pci_set_id(
        self, vendor: int, device: int, subsystem_vendor: int = 0, subsystem: int = 0
    ) -> None:
        self.config_space()  # which must be there
        self._lib.vfu_pci_set_id(self.handle, vendor, device, subsystem_vendor, subsystem)

    def pci_set_class(self, base: int, sub: int, programming_interface: int = 0) -> None:
        self.config_space()
        self._lib.vfu_pci_set_class(self.handle, base, sub, programming_interface)

    def config_space(self) -> memoryview:
        """The configuration space itself, to read and write.  ValueError before `pci_init`."""
        if not self._config_size:
            raise ValueError("there is no configuration space; call pci_init first")
        address = self._lib.vfu_pci_get_config_space(self.handle)
        return memoryview(self._ffi.buffer(address, self._config_size))

    def pci_add_capability(
        self, data: bytes, *, position: int = 0, flags: CapabilityFlag = CapabilityFlag.NONE
    ) -> int:
        """Add a capability, header and all, and say where it is; position 0: wherever it fits."""
        self.config_space()
        buffer = self._ffi.new("char[]", data.ljust(256, b"\0"))
        place = self._lib.vfu_pci_add_capability(self.handle, position, flags, buffer)
        return self._check("vfu_pci_add_capability", place)

    def pci_find_capability(
        self, number: int, *, extended: bool = False, after: int | None = None
    ) -> int | None:
        """Where the first such capability is, or the next one `after` that place."""
        self.config_space()
        if after is None:
            place = self._lib.vfu_pci_find_capability(self.handle, extended, number)
        else:
            place = self._lib.vfu_pci_find_next_capability(self.handle, extended, after, number)
        if not place and self._ffi.errno != errno.ENOENT:
            raise self._error("vfu_pci_find_capability")
        return int(place) or None

    def setup_region(
        self,
        index: Region,
        size: int,
        *,
        read: Callable[[int, int], bytes | bytearray | memoryview] | None = None,
        write: Callable[[int, memoryview], None] | None = None,
        flags: RegionFlag = RegionFlag.READ_WRITE | RegionFlag.MEM,
        areas: Sequence[tuple[int, int]] = (),
        fd: int | None = None,
        offset: int = 0,
    ) -> None:
        """Give the device a region of `size` bytes.

        `read(offset, count)` returns exactly `count` bytes; `write(offset, data)` may use `data`
        during the call only.  Without either the region has no callback.  With `fd`, which stays
        the caller's, the client may map the region, from `offset` in that file: all of it, or the
        `areas`, each an offset in the region and a size.
        """

        def access(address: int, count: int, offset: int, is_write: bool) -> int:
            buffer = self._buffer(address, count)
            if is_write:
                if write is None:
                    raise OSError(errno.EINVAL, f"region {index} cannot be written")
                write(offset, buffer.toreadonly())
            elif read is None:
                raise OSError(errno.EINVAL, f"region {index} cannot be read")
            else:
                buffer[:] = read(offset, count)
            return count

        called = read is not None or write is not None
        vectors = self._ffi.new("struct iovec[]", len(areas)) if areas else self._ffi.NULL
        for number, (start, length) in enumerate(areas):
            vectors[number].iov_base = self._ffi.cast("void *", start)
            vectors[number].iov_len = length
        result = self._lib.vfu_setup_region(
            self.handle,
            index,
            size,
            self._make(callbacks.ACCESS, access) if called else self._ffi.NULL,
            flags,
            vectors,
            len(areas),
            -1 if fd is None else fd,
            offset,
        )
        self._check(f"vfu_setup_region {index}", result)

    def create_ioeventfd(
        self,
        index: Region,
        fd: int,
        *,
        offset: int,
        size: int,
        flags: int = 0,
        datamatch: int = 0,
        shadow: tuple[int, int] | None = None,
    ) -> None:
        """Offer the client to have writes at `offset` of a region signal `fd` instead.

        `shadow`, a descriptor and an offset, is where the value written is left; few libraries and
        kernels know it.
        """
        shadow_fd, shadow_offset = shadow or (-1, 0)
        result = self._lib.vfu_create_ioeventfd(
            self.handle, index, fd, offset, size, flags, datamatch, shadow_fd, shadow_offset
        )
        self._check("vfu_create_ioeventfd", result)

    def setup_irqs(self, kind: Irq, count: int) -> None:
        """How many interrupts of a kind there are; ERR and REQ have one unless told otherwise."""
        result = self._lib.vfu_setup_device_nr_irqs(self.handle, kind, count)
        self._check("vfu_setup_device_nr_irqs", result)

    def setup_irq_state(self, kind: Irq, changed: Callable[[int, int, bool], None]) -> None:
        """Have `changed(start, count, masked)` called when the client masks or unmasks."""
        entry = self._make(callbacks.IRQ_STATE, changed)
        result = self._lib.vfu_setup_irq_state_callback(self.handle, kind, entry)
        self._check("vfu_setup_irq_state_callback", result)

    def setup_dma(
        self,
        *,
        register: Callable[[DmaRegion], None] | None = None,
        unregister: Callable[[DmaRegion], None] | None = None,
        max_regions: int = MAX_DMA_REGIONS,
    ) -> None:
        """Take guest memory.  When `unregister` returns, nothing may use that memory any more.

        Older libraries know no `max_regions`; see `Library.limits_dma`.
        """
        if self._has_dma:
            raise ValueError("setup_dma was called already")
        arguments: list[Native] = [self._on_dma(register), self._on_dma(unregister)]
        if self._library.limits_dma:
            arguments.insert(0, max_regions)
        result = self._lib.vfu_setup_device_dma(self.handle, *arguments)
        self._check("vfu_setup_device_dma", result)
        self._has_dma = True

    def setup_reset(self, reset: Callable[[ResetKind], None]) -> None:
        entry = self._make(callbacks.RESET, lambda kind: reset(ResetKind(kind)))
        self._check(
            "vfu_setup_device_reset_cb", self._lib.vfu_setup_device_reset_cb(self.handle, entry)
        )

    def setup_quiesce(self, quiesce: Callable[[], None]) -> None:
        """Have `quiesce` called before memory, migration state or the client goes, or a reset.

        From its return to that of `run` the device uses no guest memory, except in callbacks.
        OSError(EBUSY) means: later, when `quiesced` is called; any other refuses the request.
        """
        entry = self._make(callbacks.QUIESCE, quiesce)
        self._lib.vfu_setup_device_quiesce_cb(self.handle, entry)

    def setup_migration(self, migration: Migration) -> None:
        """Offer migration."""
        table = self._ffi.new("vfu_migration_callbacks_t *")
        table.version = MIGRATION_VERSION
        table.transition = self._make(
            callbacks.TRANSITION, lambda state: migration.transition(MigrationState(state))
        )

        def read_data(address: int, count: int) -> int:
            data = memoryview(migration.read_data(count)).cast("B")
            self._buffer(address, count)[: len(data)] = data
            return len(data)

        def write_data(address: int, count: int) -> int:
            migration.write_data(self._buffer(address, count).toreadonly())
            return count

        table.read_data = self._make(callbacks.DATA, read_data)
        table.write_data = self._make(callbacks.DATA, write_data)
        result = self._lib.vfu_setup_device_migration_callbacks(self.handle, table)
        self._check("vfu_setup_device_migration_callbacks", result)

    # --- serving it -----------------------------------------------------------------------------

    def realize(self) -> None:
        """The device is described; needed before `attach`."""
        self._check("vfu_realize_ctx", self._lib.vfu_realize_ctx(self.handle))

    @property
    def poll_fd(self) -> int:
        """What to wait for reading on; another one after `attach`, and when the client has gone."""
        return self._check("vfu_get_poll_fd", self._lib.vfu_get_poll_fd(self.handle))

    def attach(self) -> bool:
        """Take a client; False if none is there.

        It waits for the client's VERSION even if the context is not `blocking`.
        """
        result = self._lib.vfu_attach_ctx(self.handle)
        if result < 0 and self._ffi.errno in {errno.EAGAIN, errno.EWOULDBLOCK}:
            return False
        self._check("vfu_attach_ctx", result)
        return True

    def run(self) -> int:
        """Serve what the client asks: one request, or, if `blocking`, until it goes.

        How many requests there were.  Raises OSError: ENOTCONN when the client has gone, EBUSY
        until `quiesced` is called; and what callbacks raised.  It waits for the rest of a request,
        and for the client to take a reply.
        """
        result = self._lib.vfu_run_ctx(self.handle)
        code = self._ffi.errno
        self._entry_points.check()
        if result < 0:
            raise OSError(code, f"vfu_run_ctx: {os.strerror(code)}")
        return int(result)

    def quiesced(self, error: int = 0) -> None:
        """The device that was busy has come to rest, or failed to with this errno."""
        result = self._lib.vfu_device_quiesced(self.handle, error)
        code = self._ffi.errno
        self._entry_points.check()
        if result < 0:
            raise OSError(code, f"vfu_device_quiesced: {os.strerror(code)}")

    def irq_trigger(self, vector: int) -> None:
        """Interrupt the guest.  ENOENT while the client has given no eventfd for it."""
        self._check(f"vfu_irq_trigger {vector}", self._lib.vfu_irq_trigger(self.handle, vector))

    def scatter(
        self, iova: int, size: int, protection: Protection = Protection.READ
    ) -> ScatterList:
        """Guest memory at `iova`, in one piece or several.  ENOENT, EACCES: not like that."""
        if not self._has_dma:
            raise ValueError("the device takes no guest memory; call setup_dma first")
        return ScatterList(self, iova, size, protection)

    # --- helpers --------------------------------------------------------------------------------

    def _make(self, kind: EntryKind, function: Callable[..., int | None]) -> Native:
        address = self._entry_points.make(kind, function)
        return self._ffi.cast("void *", address)

    def _on_dma(self, function: Callable[[DmaRegion], None] | None) -> Native:
        if function is None:
            return self._ffi.NULL

        def entry(address: int) -> None:
            info = self._ffi.cast("vfu_dma_info_t *", address)
            size = info.iova.iov_len
            memory = memoryview(self._ffi.buffer(info.vaddr, size)) if info.vaddr else None
            iova = int(self._ffi.cast("uintptr_t", info.iova.iov_base))
            function(DmaRegion(iova, size, Protection(info.prot & 3), info.page_size, memory))

        return self._make(callbacks.DMA, entry)

    def _buffer(self, address: int, count: int) -> memoryview:
        return memoryview(self._ffi.buffer(self._ffi.cast("char *", address), count)).cast("B")

    def _check(self, what: str, result: int) -> int:
        if result < 0:
            raise self._error(what)
        return int(result)

    def _error(self, what: str) -> OSError:
        code = self._ffi.errno
        return OSError(code, f"{what}: {os.strerror(code)}")
