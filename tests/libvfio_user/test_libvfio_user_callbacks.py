"""Entry points: what they return and raise, and that they need no writable-executable memory."""

from __future__ import annotations

import ctypes
import errno
import subprocess
import sys
from typing import Final

import pytest

from vfio_user_virtio.libvfio_user.callbacks import ACCESS, RESET, EntryPoints

UNDER_DENIAL: Final = """
import ctypes, sys
libc = ctypes.CDLL(None, use_errno=True)
PR_SET_MDWE, PR_MDWE_REFUSE_EXEC_GAIN, EINVAL = 65, 1, 22
if libc.prctl(PR_SET_MDWE, PR_MDWE_REFUSE_EXEC_GAIN, 0, 0, 0):
    sys.exit("no PR_SET_MDWE" if ctypes.get_errno() == EINVAL else 1)
from vfio_user_virtio.libvfio_user.callbacks import RESET, EntryPoints
address = EntryPoints().make(RESET, lambda kind: kind * 2)
assert RESET(address)(None, 21) == 42
both = [line for line in open("/proc/self/maps") if " rwx" in line or " -wx" in line]
assert not both, both
import cffi
try:
    cffi.FFI().callback("int(int)", lambda value: value)
except MemoryError:
    print("as the module head says")
"""


def test_they_work_where_writable_executable_memory_is_denied() -> None:
    """What decided between the ways to be called back; the last part is why not `ffi.callback`."""
    done = subprocess.run(
        [sys.executable, "-c", UNDER_DENIAL], check=False, capture_output=True, text=True
    )
    if "no PR_SET_MDWE" in done.stderr:
        pytest.skip("the kernel has no PR_SET_MDWE (Linux 6.3)")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "as the module head says\n"


def test_what_a_function_returns_is_returned_and_none_is_0() -> None:
    points = EntryPoints()
    assert RESET(points.make(RESET, lambda kind: kind + 1))(None, 4) == 5
    assert RESET(points.make(RESET, lambda _: None))(None, 4) == 0
    seen: list[object] = []
    access = ACCESS(points.make(ACCESS, lambda *arguments: seen.append(arguments)))
    assert access(None, 0x1000, 1 << 40, 1 << 50, True) == 0
    assert seen == [(0x1000, 1 << 40, 1 << 50, True)]
    points.check()


def test_an_os_error_is_an_errno_and_nothing_else() -> None:
    points = EntryPoints()

    def refuse(_: int) -> int:
        raise OSError(errno.ENOSPC, "full")

    assert RESET(points.make(RESET, refuse))(None, 0) == -1
    assert ctypes.get_errno() == errno.ENOSPC
    points.check()


def test_another_exception_is_kept_until_asked_for() -> None:
    points = EntryPoints()
    failures = iter((ValueError("first"), KeyError("second")))

    def fail(_: int) -> int:
        raise next(failures)

    entry = RESET(points.make(RESET, fail))
    assert entry(None, 0) == -1
    assert entry(None, 0) == -1
    assert ctypes.get_errno() == errno.EIO
    with pytest.raises(ValueError, match="first"):
        points.check()
    points.check()
