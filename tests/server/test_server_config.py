"""Configuration files: what is right becomes plain data, what is wrong is named with its remedy."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.server.software import software
from vfio_user_virtio.errors import ConfigError, HostError
from vfio_user_virtio.virtio.features import Feature
from vfio_user_virtio_server import values
from vfio_user_virtio_server.config import (
    InheritedSocket,
    OwnerConfig,
    SocketFd,
    SocketPath,
    parse_document,
    read_file,
)

EXAMPLE = Path(__file__).parents[2] / "server" / "systemd" / "example.toml"


def parse(text: str) -> tuple[OwnerConfig, ...]:
    return software(parse_document(tomllib.loads(text), "f.toml", seed=b"host"))


def member(line: str) -> str:
    return f"[[owner]]\n[[owner.member]]\n{line}\n"


def refusal(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(text)
    message = str(caught.value)
    assert message.startswith(("f.toml: ", "f.toml, "))
    assert "\n" not in message
    return message


def test_the_example_says_everything_there_is_to_say() -> None:
    office, lab = software(read_file(str(EXAMPLE), seed=b"host").owners)
    assert office.name == "office"
    assert office.uplink == values.TapUplink("vnet0")
    vm1, vm2 = office.members
    assert vm1.name == "vm1"
    assert vm1.socket == SocketPath("/run/vfio-user-virtio/vm1.sock", 0o660, "kvm")
    assert vm1.member.member_id == 1
    assert vm1.member.mac == bytes.fromhex("525400a10001")
    assert vm1.member.mtu == 1500
    assert vm1.member.queue_pairs == 4
    assert vm1.member.queue_size == 256
    assert vm1.member.speed == 10_000
    assert vm1.member.max_tx_rate == 500_000_000
    assert vm1.member.access_vlan == 10
    assert vm2.member.member_id == 2
    assert vm2.member.features_off == Feature.HOST_USO.mask
    assert vm2.member.features_on == Feature.NOTIFICATION_DATA.mask
    assert vm2.pcap == "/var/lib/vfio-user-virtio/vm2.pcap"
    assert lab.uplink == values.NO_UPLINK
    (lab1,) = lab.members
    assert lab1.socket == InheritedSocket("lab")
    assert lab1.member.mac == values.derived_mac(str(EXAMPLE), "lab", "lab1", seed=b"host")


def test_what_is_left_out_has_a_default() -> None:
    (owner,) = parse("[[owner]]\n[[owner.member]]\n[[owner.member]]\n")
    assert owner.name == "owner1"
    assert owner.uplink == values.NO_UPLINK
    assert owner.p2p
    assert [served.name for served in owner.members] == ["owner1-1", "owner1-2"]
    assert [served.member.member_id for served in owner.members] == [1, 2]
    assert owner.members[0].socket == InheritedSocket(None)
    assert owner.members[0].member.mac != owner.members[1].member.mac
    assert not owner.members[0].member.allow_unsealed_memory
    assert not owner.members[0].legacy


@pytest.mark.parametrize("p2p", [False, True])
def test_migration_states_are_the_owners(*, p2p: bool) -> None:
    (owner,) = parse(f"[[owner]]\np2p = {str(p2p).lower()}\n[[owner.member]]\n")
    assert owner.p2p == p2p


def test_a_legacy_view_is_the_members() -> None:
    (owner,) = parse("[[owner]]\n[[owner.member]]\nlegacy = true\n[[owner.member]]\n")
    assert [served.legacy for served in owner.members] == [True, False]


def test_two_files_on_one_host_do_not_make_the_same_addresses() -> None:
    document = tomllib.loads(member(""))
    (one,) = software(parse_document(document, "vm1.toml", seed=b"host"))
    (two,) = software(parse_document(document, "vm2.toml", seed=b"host"))
    assert one.members[0].member.mac != two.members[0].member.mac


def test_a_passed_descriptor() -> None:
    (owner,) = parse(member("fd = 3"))
    assert owner.members[0].socket == SocketFd(3)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ["no [[owner]]"]),
        ("[[owner]]", ["owner 1", "1 to 255 members, not 0"]),
        ("[owner]", ["write [[owner]]"]),
        ("owner = 3", ["write [[owner]]"]),
        ("[[owners]]", ["unknown key 'owners'", "did you mean owner?"]),
        ("[[owner]]\ntap = 'x'", ["owner 1", "members, not 0"]),
        (member("") + "[owner.uplink]\nx = 1", ["uplink", "is a table; write a string"]),
        (member("qeue_pairs = 2"), ["'qeue_pairs'", "did you mean queue_pairs?"]),
        (member("queue-pairs = 2"), ["did you mean queue_pairs?"]),
        (member("zzz = 2"), ["unknown key 'zzz'", "there are: access_vlan,"]),
        (member("mtu = 67"), ["owner 1, member 1", "mtu 67", "68 to 65535"]),
        (member("mtu = '1500'"), ["mtu", "'1500' is a string; write an integer"]),
        (member("mtu = true"), ["mtu", "True is true or false; write an integer"]),
        (member("mtu = 1500.0"), ["fraction; write an integer"]),
        (member("mtu = 2024-01-01"), ["a date or time; write an integer"]),
        (member("queue_pairs = 9"), ["queue_pairs 9", "1 to 8"]),
        (member("queue_pairs = 0"), ["queue_pairs 0", "1 to 8"]),
        (member("queue_size = 100"), ["100", "power of two"]),
        (member("access_vlan = 4095"), ["access_vlan 4095", "1 to 4094"]),
        (member("max_tx_rate = '1bit'"), ["max_tx_rate 1", "64000"]),
        (member("max_tx_rate = 'fast'"), ["max_tx_rate", "'fast' is not a rate"]),
        (member("mac = '33:33:00:00:00:01'"), ["mac", "group address"]),
        (member("socket_path = ''"), ["socket_path", "not a path"]),
        (member("socket_mode = '0660'"), ["socket_path: is missing"]),
        (member("socket_path = '/x'\nfd = 3"), ["only one of"]),
        (member("fd = 1"), ["fd", "1 is not a passed descriptor"]),
        (member("name = 'a b'"), ["name", "'a b' is not a name"]),
        (member("features = { HOST_USOO = false }"), ["did you mean HOST_USO?"]),
        (member("features = { VERSION_1 = false }"), ["unknown feature 'VERSION_1'"]),
        (member("features = { CSUM = 0 }"), ["features: CSUM", "write true or false"]),
        (member("features = 3"), ["features", "write a table"]),
        (member("features = { CSUM = false }"), ["HOST_TSO4 without CSUM", "both off or neither"]),
        (member("allow_unsealed_memory = 1"), ["write true or false"]),
        ("[[owner]]\n" + "[[owner.member]]\n" * 256, ["1 to 255 members, not 256"]),
        ("[[owner]]\nuplink = 'tap'\n[[owner.member]]", ["uplink: 'tap' is not an uplink"]),
        ("[[owner]]\nname = 'a'\n[[owner.member]]\n" * 2, ["owner name a is used by", "and by"]),
    ],
)
def test_what_is_wrong_is_refused_with_its_place_and_a_remedy(text: str, parts: list[str]) -> None:
    message = refusal(text)
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ("mac = '52:54:00:00:00:01'", "MAC address 52:54:00:00:00:01"),
        ("name = 'vm'", "member name vm"),
        ("socket_path = '/run/s'", "path /run/s"),
        ("fd = 4", "descriptor 4"),
        ("fd_name = 'x'", "passed socket x"),
        ("pcap = '/tmp/p'", "path /tmp/p"),
    ],
)
def test_what_only_one_can_have(line: str, kind: str) -> None:
    message = refusal(member(line) + member(line))
    assert kind in message
    assert "owner1" in message
    assert "owner2" in message


def test_paths_are_compared_whatever_their_spelling_and_use() -> None:
    text = "[[owner]]\nuplink = 'stream-listen:/run/x/../s'\n" + "[[owner.member]]\n"
    assert "path /run/s" in refusal(text + "socket_path = '/run/s'")


def test_a_tap_device_serves_one_owner() -> None:
    text = "[[owner]]\nuplink = 'tap:t'\n[[owner.member]]\n"
    assert "TAP device t" in refusal(text * 2)


def test_as_many_members_as_an_owner_can_have() -> None:
    (owner,) = parse("[[owner]]\n" + "[[owner.member]]\n" * 255)
    assert [served.member.member_id for served in owner.members] == list(range(1, 256))
    assert len({served.member.mac for served in owner.members}) == 255


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"\xff", "byte 0 is not UTF-8"),
        (b"[[owner", "not TOML"),
        (b"a = " + b"[" * 100_000, "nested too deeply"),
    ],
)
def test_a_file_that_is_not_toml(tmp_path: Path, content: bytes, problem: str) -> None:
    path = tmp_path / "c.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=problem) as caught:
        read_file(str(path))
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("name", ["", "missing.toml"])
def test_a_file_that_cannot_be_read(tmp_path: Path, name: str) -> None:
    with pytest.raises(HostError, match="cannot read the configuration") as caught:
        read_file(str(tmp_path / name))
    assert caught.value.exit_code == os.EX_NOINPUT


toml_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(("owner", "member", "name", "mac", "mtu", "uplink", "features", "fd"))
            | st.text(max_size=5),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(st.dictionaries(st.sampled_from(("owner", "ownr")), toml_values, max_size=2))
def test_any_document_is_taken_or_refused(document: dict[str, object]) -> None:
    try:
        owners = parse_document(document, "f.toml", seed=b"")
    except ConfigError as error:
        assert str(error).startswith("f.toml")  # noqa: PT017 - it need not be raised
    else:
        assert owners
