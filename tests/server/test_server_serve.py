"""serve's options as configuration, and the addresses that are made when none is given."""

from __future__ import annotations

import argparse
import os
import socket
from typing import TYPE_CHECKING

from tests.server.server_process import short_folder
from vfio_user_virtio_server import activation, serve, values
from vfio_user_virtio_server.config import InheritedSocket, OwnerConfig, SocketFd, SocketPath

if TYPE_CHECKING:
    import pytest


def owner(*arguments: str) -> OwnerConfig:
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    (made,) = serve.configuration_of(parser.parse_args(arguments)).owners
    assert isinstance(made, OwnerConfig)
    return made


def mac(*arguments: str) -> bytes:
    (served,) = owner(*arguments).members
    return served.member.mac


def test_every_option_arrives() -> None:
    made = owner(
        *("--socket-path", "/run/s", "--socket-mode", "0660", "--socket-group", "kvm"),
        *("--mac", "52:54:00:12:34:56", "--mtu", "9000", "--queue-pairs", "4"),
        *("--uplink", "tap:vnet0", "--pcap", "/tmp/p", "--max-tx-rate", "1gbit"),
        "--allow-unsealed-memory",
        *("--no-p2p", "--legacy"),
    )
    assert not made.p2p
    assert made.uplink == values.TapUplink("vnet0")
    assert made.pcap is None
    (served,) = made.members
    assert served.socket == SocketPath("/run/s", 0o660, "kvm")
    assert served.pcap == "/tmp/p"
    assert served.member.mac == bytes.fromhex("525400123456")
    assert (served.member.mtu, served.member.queue_pairs) == (9000, 4)
    assert served.member.max_tx_rate == 10**9
    assert served.member.allow_unsealed_memory
    assert served.legacy


def test_what_is_left_out_has_a_default() -> None:
    made = owner()
    assert made.uplink == values.NO_UPLINK
    assert made.p2p
    (served,) = made.members
    assert served.socket == InheritedSocket()
    assert served.member.mtu is None
    assert not served.member.allow_unsealed_memory
    assert not served.legacy


def test_a_passed_descriptor() -> None:
    assert owner("--fd", "900").members[0].socket == SocketFd(900)


def test_made_addresses_follow_the_path_of_the_socket(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """However the socket comes: instances of a template unit must not share an address."""
    macs = set()
    with short_folder() as folder:
        for name in ("vm1", "vm2"):
            path = str(folder / name)
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(path)
                expected = mac("--socket-path", path)
                assert mac("--fd", str(listener.fileno())) == expected
                monkeypatch.setattr(activation, "FIRST_FD", listener.fileno())
                assert mac() == expected
            macs.add(expected)
    assert len(macs) == 2
    assert not caplog.records


def test_a_socket_without_a_path_is_mentioned(caplog: pytest.LogCaptureFixture) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert mac("--fd", str(ours.fileno()))[0] & 0x0F == 2
    (record,) = caplog.records
    assert "--mac" in record.getMessage()


def test_what_is_no_socket_is_not_this_functions_affair(caplog: pytest.LogCaptureFixture) -> None:
    with socket.socket(socket.AF_INET) as tcp, open(os.devnull) as file:
        for fd in (tcp.fileno(), file.fileno(), 900):
            assert mac("--fd", str(fd))[0] & 0x0F == 2
    assert not caplog.records
