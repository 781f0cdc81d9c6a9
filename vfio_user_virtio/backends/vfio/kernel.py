"""How the kernel is asked: one ioctl, one pointer, and an answer in words if it says no.

An errno of VFIO says little by itself (EINVAL has two dozen reasons), so whoever asks also says
what for, and what each errno that is to be expected means there.  What comes of it is a
`KernelRefusal`: a `HostError` for whoever starts the program, with the errno for whoever has to
answer a client.

Requests are ``bytearray``: the kernel answers into them, and of a ``bytes`` argument `fcntl.ioctl`
would return the changed copy instead of the number that the kernel returned.  Both are allowed to
be as long as they like; `fcntl.ioctl` lets other threads run meanwhile.

The kernel is trusted, but versions of it differ: what it answers is checked for its shape, and a
shape that is none raises HostError (`malformed`).
"""

from __future__ import annotations

import errno as errno_module
import fcntl
import os
import resource
from typing import TYPE_CHECKING, Final

import cffi

from vfio_user_virtio.errors import HostError

if TYPE_CHECKING:
    import enum
    import mmap
    from collections.abc import Mapping

_FFI: Final = cffi.FFI()
_REMEDIES: Final[Mapping[int, str]] = {
    errno_module.ENODEV: "the device has gone, or the kernel has taken it back",
    errno_module.ENOTTY: "this kernel does not know the call",
}


class KernelRefusal(HostError):
    """The kernel refused a call with `errno`."""

    def __init__(self, errno: int, message: str) -> None:
        super().__init__(message, exit_code=os.EX_UNAVAILABLE)
        self.errno = errno


def ioctl(
    fd: int,
    request: enum.IntEnum,
    argument: bytearray | int = 0,
    *,
    what: str,
    remedies: Mapping[int, str] | None = None,
) -> int:
    """Send `request`; the number that the kernel returns.  `argument`, if bytes, is its answer.

    Raises KernelRefusal "`what`: …"; `remedies` says what an errno means here.
    """
    try:
        return fcntl.ioctl(fd, request, argument)
    except OSError as error:
        raise refusal(error, f"{what}: {request.name}", remedies) from error


def refusal(error: OSError, what: str, remedies: Mapping[int, str] | None = None) -> KernelRefusal:
    """The same for another system call that failed."""
    number = error.errno or errno_module.EIO
    name = errno_module.errorcode.get(number, str(number))
    message = f"{what}: {os.strerror(number)} ({name})"
    remedy = (remedies or {}).get(number) or _REMEDIES.get(number)
    return KernelRefusal(number, f"{message}; {remedy}" if remedy else message)


def malformed(what: str, found: str) -> HostError:
    """The kernel's answer to `what` cannot be."""
    return HostError(
        f"the kernel's answer to {what} cannot be understood: {found}; "
        "its VFIO is newer than this program, or broken",
        exit_code=os.EX_PROTOCOL,
    )


def address_of(buffer: bytearray | memoryview | mmap.mmap) -> int:
    """Where `buffer` is in our memory, for the kernel; it must outlive every use of the number."""
    return int(_FFI.cast("uintptr_t", _FFI.from_buffer(buffer)))


def locked_memory_remedy(size: int, pinned: int, name: str) -> str:
    """What to do when `size` bytes cannot be pinned, beside `pinned` that are for `name`."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    limit = "unlimited" if soft == resource.RLIM_INFINITY else f"{soft} bytes"
    return (
        f"{size} bytes, beside {pinned} that are pinned for {name}, are more than RLIMIT_MEMLOCK "
        f"({limit}) or the host's memory allows; raise it (LimitMEMLOCK=infinity in the unit, "
        "ulimit -l unlimited) to the guest's memory and some more"
    )
