"""Sockets that were opened for us: which are meant, what they are, and what they are not."""

from __future__ import annotations

import contextlib
import os
import socket
from typing import TYPE_CHECKING

import pytest

from vfio_user_virtio.errors import ConfigError, HostError
from vfio_user_virtio_server import activation
from vfio_user_virtio_server.activation import Inherited, adopt, assign, take_inherited
from vfio_user_virtio_server.config import InheritedSocket

if TYPE_CHECKING:
    from collections.abc import Iterator

VARIABLES = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    yield monkeypatch
    assert not any(name in os.environ for name in VARIABLES)


def set_variables(
    environment: pytest.MonkeyPatch, fds: str, names: str | None = None, pid: int | None = None
) -> None:
    environment.setenv("LISTEN_PID", str(os.getpid() if pid is None else pid))
    environment.setenv("LISTEN_FDS", fds)
    if names is not None:
        environment.setenv("LISTEN_FDNAMES", names)


@pytest.fixture
def passed_pair(environment: pytest.MonkeyPatch) -> Iterator[int]:
    """Two descriptors as a manager passes them; where it would start at 3, these start higher."""
    ours = [os.dup2(0, fd) for fd in (700, 701)]
    environment.setattr(activation, "FIRST_FD", ours[0])
    yield ours[0]
    for fd in ours:
        os.close(fd)


def test_without_variables_nothing_is_passed(environment: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        environment.delenv(name, raising=False)
    assert take_inherited() == ()


def test_what_is_for_another_process_is_not_for_us(environment: pytest.MonkeyPatch) -> None:
    set_variables(environment, "2", "a:b", pid=os.getpid() + 1)
    assert take_inherited() == ()


@pytest.mark.parametrize(
    ("names", "expected"), [(None, ["unknown", "unknown"]), ("a:b", ["a", "b"]), (":", ["", ""])]
)
def test_what_is_passed_has_names_and_is_closed_on_exec(
    environment: pytest.MonkeyPatch, passed_pair: int, names: str | None, expected: list[str]
) -> None:
    for fd in (passed_pair, passed_pair + 1):
        os.set_inheritable(fd, True)
    set_variables(environment, "2", names)
    passed = take_inherited()
    assert [inherited.name for inherited in passed] == expected
    assert [inherited.fd for inherited in passed] == [passed_pair, passed_pair + 1]
    assert not any(os.get_inheritable(inherited.fd) for inherited in passed)


@pytest.mark.parametrize("fds", ["0", "-1", "x", "4097", "99999999999999999999", "²"])
def test_a_number_of_sockets_that_is_none(environment: pytest.MonkeyPatch, fds: str) -> None:
    set_variables(environment, fds)
    with pytest.raises(ConfigError, match="not a number of sockets"):
        take_inherited()


@pytest.mark.usefixtures("passed_pair")
def test_names_that_do_not_fit(environment: pytest.MonkeyPatch) -> None:
    set_variables(environment, "2", "only")
    with pytest.raises(ConfigError, match="1 names for LISTEN_FDS=2"):
        take_inherited()


def test_a_descriptor_that_is_closed(environment: pytest.MonkeyPatch) -> None:
    environment.setattr(activation, "FIRST_FD", 900)
    set_variables(environment, "1")
    with pytest.raises(HostError, match=r"descriptor 900 \(LISTEN_FDS\) is not open"):
        take_inherited()


A, B, C = Inherited(3, "a"), Inherited(4, "b"), Inherited(5, "c")
NAMED_A, NAMED_C, NEXT = InheritedSocket("a"), InheritedSocket("c"), InheritedSocket()


@pytest.mark.parametrize(
    ("wanted", "fds"),
    [
        ([NEXT, NEXT, NEXT], (3, 4, 5)),
        ([NAMED_C, NAMED_A, NEXT], (5, 3, 4)),
        ([NEXT, NAMED_A, NEXT], (4, 3, 5)),
    ],
)
def test_names_come_first_and_the_others_in_order(
    wanted: list[InheritedSocket], fds: tuple[int, ...]
) -> None:
    assert assign(wanted, [A, B, C], ["x", "y", "z"]) == fds


def test_nobody_wants_and_nothing_is_passed() -> None:
    assert assign([], [], []) == ()


@pytest.mark.parametrize(
    ("wanted", "passed", "problem"),
    [
        ([NEXT], [], "vm1 got no socket"),
        ([], [A], r"no device got 3 \(a\)"),
        ([NEXT, NEXT], [A], "vm1, vm2 got 3"),
        ([NEXT], [A, B], "vm1 got 3"),
        ([NAMED_A], [B], "'a', of which there are 0; passed are: b"),
        ([NAMED_A], [], "passed are: none"),
        ([NAMED_A], [A, Inherited(4, "a")], "of which there are 2"),
        ([NAMED_A, NAMED_A], [A, B], "vm2 wants .* there are 0"),
        ([NAMED_A], [A, B], r"no device got 4 \(b\)"),
    ],
)
def test_sockets_and_devices_that_do_not_fit(
    wanted: list[InheritedSocket], passed: list[Inherited], problem: str
) -> None:
    with pytest.raises(ConfigError, match=problem):
        assign(wanted, passed, ["vm1", "vm2"])


def test_a_socket_that_listens() -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind("")  # an abstract address of the kernel's choice
        sock.listen()
        fd = os.dup(sock.fileno())
        os.set_inheritable(fd, True)
        adopted = adopt(fd, "--fd")
        with adopted.sock:
            assert adopted.listening
            assert adopted.sock.fileno() == fd
            assert not os.get_inheritable(fd)
            assert not os.get_blocking(fd)


def test_a_socket_that_is_connected() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        adopted = adopt(os.dup(ours.fileno()), "--fd")
        with adopted.sock as sock:
            assert not adopted.listening
            theirs.send(b"x")
            assert sock.recv(2) == b"x"


@contextlib.contextmanager
def unusable(kind: str) -> Iterator[int]:
    """A descriptor that cannot serve clients."""
    with contextlib.ExitStack() as stack:
        match kind:
            case "a file":
                fd = os.open("/dev/null", os.O_RDONLY)
                stack.callback(os.close, fd)
            case "TCP":
                fd = socket.socket(socket.AF_INET).detach()
            case "datagrams":
                fd = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).detach()
            case _:
                fd = socket.socket(socket.AF_UNIX).detach()
        yield fd


@pytest.mark.parametrize(
    ("kind", "problem"),
    [
        ("a file", "is not a socket"),
        ("TCP", "AF_INET"),
        ("datagrams", "SOCK_DGRAM"),
        ("unconnected", "neither listens nor is connected"),
    ],
)
def test_descriptors_that_cannot_serve(kind: str, problem: str) -> None:
    with unusable(kind) as fd, pytest.raises(HostError, match=problem) as caught:
        adopt(fd, "--fd")
    assert f"descriptor {fd}" in str(caught.value)
    assert caught.value.exit_code == os.EX_CONFIG


def test_a_descriptor_that_is_not_there() -> None:
    with pytest.raises(HostError, match=r"descriptor 901 \(--fd\) is not open"):
        adopt(901, "--fd")
