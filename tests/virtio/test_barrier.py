"""Barriers: which one a machine gets.  That they order anything no test could show."""

from __future__ import annotations

import ctypes
import platform
import threading

import pytest

from vfio_user_virtio.errors import HostError
from vfio_user_virtio.virtio import barrier


def has_libatomic() -> bool:
    try:
        ctypes.CDLL("libatomic.so.1")
    except OSError:
        return False
    return True


def test_x86_64_needs_a_fence_for_store_then_load_only() -> None:
    barrier.choose_barrier("x86_64")()
    assert barrier.choose_barrier("x86_64").__name__ == "barrier"
    barrier.ordering_for("x86_64")()
    assert barrier.ordering_for("x86_64").__name__ == "_nothing"


@pytest.mark.skipif(not has_libatomic(), reason="libatomic is not installed")
@pytest.mark.parametrize("choose", [barrier.choose_barrier, barrier.ordering_for])
def test_any_other_machine_gets_the_fence_of_libatomic(choose: object) -> None:
    assert callable(choose)
    fence = choose("aarch64")
    fence()
    assert fence.__name__ == "<lambda>"


@pytest.mark.parametrize("library", ["libno-such-library.so.1", "libc.so.6"])
def test_without_libatomic_the_error_says_what_to_install(library: str) -> None:
    with pytest.raises(HostError, match="install libatomic") as raised:
        barrier._libatomic_barrier(library)
    assert platform.machine() in str(raised.value)


def test_the_barriers_of_this_machine_may_be_called_from_any_thread_at_once() -> None:
    def spin() -> None:
        for _ in range(1_000):
            barrier.full_barrier()
            barrier.order_accesses()

    threads = [threading.Thread(target=spin) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert not any(thread.is_alive() for thread in threads)
