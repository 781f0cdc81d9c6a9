"""Owners made from configuration: members, uplinks and captures are what was asked for."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

import pytest

from vfio_user_virtio.backends.software.config import MemberConfig
from vfio_user_virtio.errors import HostError
from vfio_user_virtio_server import values
from vfio_user_virtio_server.assembly import assemble
from vfio_user_virtio_server.config import OwnerConfig, ServedMember

if TYPE_CHECKING:
    from pathlib import Path

MAC = bytes.fromhex("020000000001")


def config(
    uplink: values.UplinkConfig = values.NO_UPLINK,
    *,
    pcap: str | None = None,
    uplink_pcap: str | None = None,
) -> OwnerConfig:
    member = ServedMember(name="vm1", member=MemberConfig(member_id=7, mac=MAC), pcap=pcap)
    return OwnerConfig(name="o", members=(member,), uplink=uplink, pcap=uplink_pcap)


def test_members_keep_their_ids_and_names() -> None:
    with contextlib.ExitStack() as closers:
        owner = assemble(config(), closers)
    assert list(owner.members) == [7]
    assert owner.members[7].name == "vm1"
    assert owner.members[7].config.mac == MAC


@pytest.mark.parametrize(
    ("uplink", "kind"),
    [
        (values.NoUplink(), None),
        (values.DatagramUplink("/run/a", "/run/b"), "DatagramUplink"),
        (values.StreamUplink("/run/a"), "StreamClientUplink"),
        (values.StreamListenUplink("/run/a"), "StreamServerUplink"),
        (values.PasstUplink("/run/passt"), "StreamClientUplink"),
    ],
)
def test_uplinks(uplink: values.UplinkConfig, kind: str | None) -> None:
    with contextlib.ExitStack() as closers:
        owner = assemble(config(uplink), closers)
    made = [type(uplink).__name__ for uplink in owner._uplinks]
    assert made == ([] if kind is None else [kind])


def test_passt_of_our_own_has_to_be_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with contextlib.ExitStack() as closers, pytest.raises(HostError, match="install passt"):
        assemble(config(values.PasstUplink(None)), closers)


def test_a_descriptor_that_is_no_tap_device() -> None:
    with (
        open(os.devnull) as file,
        contextlib.ExitStack() as closers,
        pytest.raises(HostError, match="not attached to a TAP device"),
    ):
        assemble(config(values.TapFdUplink(file.fileno())), closers)


def test_a_sandbox_that_forbids_tap_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(_: str) -> None:
        raise PermissionError(1, "Operation not permitted")

    module = "vfio_user_virtio.backends.software.uplinks.tun_device"
    monkeypatch.setattr(f"{module}.open_tap", forbidden)
    with contextlib.ExitStack() as closers, pytest.raises(HostError, match="tap-fd"):
        assemble(config(values.TapUplink("vnet0")), closers)


def test_captures_are_private_files_that_are_closed_in_the_end(tmp_path: Path) -> None:
    paths = tmp_path / "member", tmp_path / "uplink"
    wanted = config(values.StreamUplink("/run/a"), pcap=str(paths[0]), uplink_pcap=str(paths[1]))
    before = len(os.listdir("/proc/self/fd"))
    with contextlib.ExitStack() as closers:
        assemble(wanted, closers)
        assert len(os.listdir("/proc/self/fd")) == before + 2
    assert len(os.listdir("/proc/self/fd")) == before
    for path in paths:
        assert path.read_bytes()[:4] == b"\x0a\x0d\x0d\x0a"
        assert path.stat().st_mode & 0o777 == 0o600
