"""The client's memory files in our address space: each mapped once, whole, and shared by slices.

Why: QEMU sends the same memfd 10 to 30 times per boot, and behind a vIOMMU once per 4 KiB page.
A mapping of its own for each would meet the kernel's limit on mappings (65,530) and on open files
before the client met ours.  So a file is mapped once per access, as a whole, with the one duplicate
of its fd that Python's mmap keeps, and it goes when the last DMA mapping that slices it does.

A client could kill or stall the server with what it maps, so a file is taken only if it cannot:
shared memory (memfd, tmpfs, hugetlbfs), sealed against shrinking.  Memory of a file that has been
truncated, or whose file system is a process that does not answer (FUSE), would otherwise end or
stop us at the first touch.  The seal is asked for before anything else, because even `fstat` may
wait for ever on such a file system.  Where the client is trusted, `allow_unsealed` takes any
regular file.  Rejected: a SIGBUS handler (nothing sound can be done in one from Python) and
copying by pread and pwrite (a system call and a copy per buffer).

Files are told apart by device and inode number.  Both are the client's to choose within limits, so
this table belongs to one client: the worst a collision does is to show it another of its own files.

Source: vfio-user, VFIO_USER_DMA_MAP; memfd_create(2), fcntl(2) F_GET_SEALS.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import stat
from typing import Final, TypeAlias

from vfio_user_virtio import limits
from vfio_user_virtio.device import DmaAccess
from vfio_user_virtio.errors import ClientError

REMEDY: Final = "start the guest with memory-backend-memfd,share=on"

_Key: TypeAlias = tuple[int, int, bool]
"""st_dev, st_ino, writable."""


class MappedFile:
    """A file's first `size` bytes in our address space.  `users` counts the DMA mappings on it.

    `readable` is a read-only view of all of it, `writable` a writable one or None.
    """

    __slots__ = ("_mapping", "key", "readable", "size", "users", "writable")

    def __init__(self, key: _Key, mapping: mmap.mmap) -> None:
        self._mapping = mapping
        self.key = key
        self.size = len(mapping)
        self.users = 0
        view = memoryview(mapping)
        self.readable = view.toreadonly()
        self.writable = view if key[2] else None

    def close(self) -> None:
        """Drop our views; the memory goes now or, if someone still holds one, with the last."""
        self.readable.release()
        if self.writable is not None:
            self.writable.release()
        with contextlib.suppress(BufferError):  # a view is alive; the mapping dies with it
            self._mapping.close()


class MappedFiles:
    """The files of one client, by identity and access.

    At most `max_files` mappings and `limits.MAX_MAPPED_BYTES` of address space are alive at once.
    """

    def __init__(
        self, *, allow_unsealed: bool = False, max_files: int = limits.MAX_MAPPED_FILES
    ) -> None:
        self._allow_unsealed = allow_unsealed
        self._max_files = max_files
        self._files: dict[_Key, MappedFile] = {}
        self._count = 0
        self._bytes = 0

    def __len__(self) -> int:
        """How many mappings are alive; a file that has grown may count twice for a while."""
        return self._count

    def acquire_untrusted(self, fd: int, offset: int, size: int, access: DmaAccess) -> MappedFile:
        """The mapping that holds `size` bytes at `offset` of the file behind `fd`, all in bytes.

        The caller keeps `fd` (and may close it at once), and gives the result back with `release`.
        Raises ClientError: EINVAL for what is not a file we can take or a range outside it, EPERM
        without the seal, EACCES without the access, ENOSPC beyond a bound, or what mmap said.
        """
        try:
            self._check_seals(fd)
            writable = self._check_access(fd, access)
            status = os.fstat(fd)
        except OSError as error:
            raise _refused(fd, "cannot be examined", error) from error
        if not stat.S_ISREG(status.st_mode):
            raise ClientError(
                errno.EINVAL,
                f"DMA_MAP: fd {fd} is not a regular file (mode {status.st_mode:#o}); {REMEDY}",
            )
        if offset < 0 or offset % limits.PAGE_SIZE:
            raise ClientError(
                errno.EINVAL,
                f"DMA_MAP: offset {offset:#x} of the file is not a multiple of {limits.PAGE_SIZE}",
            )
        if offset + size > status.st_size:
            raise ClientError(
                errno.EINVAL,
                f"DMA_MAP: offset {offset:#x} + size {size:#x} is past the end of the file, which "
                f"has {status.st_size:#x} bytes; map no more than the file holds",
            )
        key = (status.st_dev, status.st_ino, writable)
        file = self._files.get(key)
        if file is None or offset + size > file.size:  # new, or it has grown since
            file = self._map(fd, key, status.st_size)
        file.users += 1
        return file

    def release(self, file: MappedFile) -> None:
        """Give back one `acquire_untrusted`; the last one unmaps."""
        file.users -= 1
        if file.users:
            return
        if self._files.get(file.key) is file:
            del self._files[file.key]
        self._count -= 1
        self._bytes -= file.size
        file.close()

    def _check_seals(self, fd: int) -> None:
        if self._allow_unsealed:
            return
        try:
            seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
        except OSError as error:
            raise _refused(
                fd, f"is not shared memory (memfd, tmpfs or hugetlbfs); {REMEDY}", error
            ) from error
        if not seals & fcntl.F_SEAL_SHRINK:
            raise ClientError(
                errno.EPERM,
                f"DMA_MAP: the file behind fd {fd} is not sealed against shrinking (seals "
                f"{seals:#x}, F_SEAL_SHRINK {fcntl.F_SEAL_SHRINK:#x} is needed), so truncating it "
                f"would kill the server; {REMEDY}, or let the server trust its client "
                "(allow_unsealed)",
            )

    def _check_access(self, fd: int, access: DmaAccess) -> bool:
        """Whether to map for writing; raises ClientError if the fd was not opened for it."""
        mode = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE
        writable = bool(access & DmaAccess.WRITE)
        if mode == os.O_RDWR or (mode == os.O_RDONLY and not writable):
            return writable
        opened = "O_RDONLY" if mode == os.O_RDONLY else "O_WRONLY"
        raise ClientError(
            errno.EACCES,
            f"DMA_MAP: fd {fd} is open {opened}, but {access!r} is asked; "
            f"pass an fd that is open O_RDWR{'' if writable else ' or O_RDONLY'}",
        )

    def _map(self, fd: int, key: _Key, size: int) -> MappedFile:
        if self._count >= self._max_files:
            raise ClientError(
                errno.ENOSPC,
                f"DMA_MAP: the limit of {self._max_files} mapped files is reached; "
                "use fewer memory backends",
            )
        if self._bytes + size > limits.MAX_MAPPED_BYTES:
            raise ClientError(
                errno.ENOSPC,
                f"DMA_MAP: a file of {size:#x} bytes, with {self._bytes:#x} mapped already, is "
                f"beyond the limit of {limits.MAX_MAPPED_BYTES:#x}; use smaller memory backends",
            )
        prot = mmap.PROT_READ | (mmap.PROT_WRITE if key[2] else 0)
        try:
            mapping = mmap.mmap(fd, size, flags=mmap.MAP_SHARED, prot=prot)
        except OSError as error:
            raise _refused(fd, f"cannot be mapped ({size:#x} bytes)", error) from error
        except ValueError as error:  # mmap asks for the size again: it shrank under our eyes
            raise ClientError(
                errno.EINVAL, f"DMA_MAP: the file behind fd {fd} shrank meanwhile: {error}"
            ) from error
        mapping.madvise(mmap.MADV_DONTDUMP)  # a core dump of ours is not to hold the guest's memory
        file = MappedFile(key, mapping)
        self._files[key] = file
        self._count += 1
        self._bytes += size
        return file


def _refused(fd: int, what: str, error: OSError) -> ClientError:
    code = error.errno or errno.EINVAL
    return ClientError(code, f"DMA_MAP: fd {fd} {what}: {os.strerror(code)}")
