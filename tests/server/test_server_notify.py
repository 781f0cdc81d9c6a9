"""What the service manager hears, and that nobody minds when it does not listen."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from typing import TYPE_CHECKING

import pytest

from vfio_user_virtio_server.notify import ServiceManager

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(params=["path", "abstract"])
def manager_socket(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[socket.socket]:
    folder = tempfile.mkdtemp(prefix="vun-")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.setblocking(False)
        if request.param == "path":
            sock.bind(f"{folder}/notify")
            monkeypatch.setenv("NOTIFY_SOCKET", f"{folder}/notify")
        else:
            sock.bind("")
            name: bytes = sock.getsockname()
            monkeypatch.setenv("NOTIFY_SOCKET", "@" + name[1:].decode())
        yield sock
    shutil.rmtree(folder)


def heard(sock: socket.socket) -> list[str]:
    messages = []
    while True:
        try:
            messages.append(sock.recv(4096).decode())
        except BlockingIOError:
            return messages


def test_what_is_told(manager_socket: socket.socket) -> None:
    manager = ServiceManager()
    assert "NOTIFY_SOCKET" not in os.environ
    manager.ready()
    manager.status("two\nlines")
    manager.status("two\nlines")
    manager.status("another")
    manager.stopping()
    assert heard(manager_socket) == [
        "READY=1",
        "STATUS=two lines",
        "STATUS=another",
        "STOPPING=1",
    ]


def test_without_a_manager_nothing_happens(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    ServiceManager().ready()
    assert not caplog.records


@pytest.mark.parametrize("address", ["/nonexistent/notify", "vsock:2:1234", "relative"])
def test_a_manager_that_cannot_be_reached_is_mentioned_once(
    address: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    manager = ServiceManager()
    manager.ready()
    manager.stopping()
    assert len(caplog.records) == 1


def test_a_manager_that_is_too_slow_does_not_stop_us(manager_socket: socket.socket) -> None:
    manager = ServiceManager()
    for number in range(10_000):
        manager.status(str(number))
    assert 0 < len(heard(manager_socket)) < 10_000
