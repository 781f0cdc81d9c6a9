"""Signalling eventfds: by the kernel, by polling, and with counters that are full."""

from __future__ import annotations

import errno
import os
import platform
from typing import TYPE_CHECKING

import pytest

from vfio_user_virtio.backends.software import eventfds
from vfio_user_virtio.backends.software.eventfds import (
    KernelSignaller,
    PollingSignaller,
    Signaller,
    shared_signaller,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

FULL = (1 << 64) - 2


@pytest.fixture
def eventfd() -> Iterator[int]:
    fd = os.eventfd(0, 0)
    yield fd
    os.close(fd)


@pytest.fixture(params=["kernel", "polling"])
def signaller(request: pytest.FixtureRequest) -> Signaller:
    if request.param == "kernel":
        assert isinstance(shared_signaller(), KernelSignaller)
        return shared_signaller()
    return PollingSignaller()


def test_each_signal_counts_one(signaller: Signaller, eventfd: int) -> None:
    for count in (1, 2, 300):
        for _ in range(count):
            signaller.signal(eventfd)
        assert os.eventfd_read(eventfd) == count


def test_many_eventfds_take_turns(signaller: Signaller) -> None:
    fds = [os.eventfd(0) for _ in range(40)]
    for position, fd in enumerate(fds):
        for _ in range(position + 1):
            signaller.signal(fd)
    assert [os.eventfd_read(fd) for fd in fds] == list(range(1, 41))
    for fd in fds:
        os.close(fd)


def test_a_full_blocking_counter_is_left_alone(signaller: Signaller, eventfd: int) -> None:
    """The kernel's way has no gap for a race: it would not wait even here, where it must not."""
    os.eventfd_write(eventfd, FULL)
    assert os.get_blocking(eventfd)
    for _ in range(3):
        signaller.signal(eventfd)
    assert os.eventfd_read(eventfd) >= FULL


def test_polling_survives_a_counter_filled_between_poll_and_write(
    eventfd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.set_blocking(eventfd, False)
    write = os.write

    def fill_first(fd: int, data: bytes) -> int:
        write(fd, FULL.to_bytes(8, "little"))
        return write(fd, data)

    monkeypatch.setattr(os, "write", fill_first)
    PollingSignaller().signal(eventfd)
    assert os.eventfd_read(eventfd) == FULL


def test_a_context_that_is_gone_falls_back(eventfd: int) -> None:
    signaller = KernelSignaller()
    signaller.signal(eventfd)
    signaller._context += 1
    signaller.signal(eventfd)
    assert os.eventfd_read(eventfd) == 2


def test_without_aio_it_polls_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "vax")
    with pytest.raises(OSError, match="vax") as caught:
        KernelSignaller()
    assert caught.value.errno == errno.ENOSYS
    assert isinstance(shared_signaller.__wrapped__(), PollingSignaller)
    assert "io_submit" in caplog.text


def test_a_refused_context_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    nonexistent = (10_000, 10_001)
    monkeypatch.setitem(eventfds._SYSTEM_CALLS, platform.machine(), nonexistent)
    with pytest.raises(OSError, match="io_setup") as caught:
        KernelSignaller()
    assert caught.value.errno == errno.ENOSYS


def test_a_ring_of_another_layout_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eventfds, "_RING_MAGIC", 0)
    with pytest.raises(OSError, match="layout"):
        KernelSignaller()
