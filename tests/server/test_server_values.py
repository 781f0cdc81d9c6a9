"""The grammar of values: what is written is what is meant, or the message says what to write."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfio_user_virtio_server import values


@pytest.mark.parametrize(
    ("text", "uplink"),
    [
        ("none", values.NoUplink()),
        ("tap:vnet0", values.TapUplink("vnet0")),
        ("tap-fd:7", values.TapFdUplink(7)),
        ("datagram:/run/a,/run/b", values.DatagramUplink("/run/a", "/run/b")),
        ("stream:/run/a:b", values.StreamUplink("/run/a:b")),
        ("stream-listen:/run/a", values.StreamListenUplink("/run/a")),
        ("passt", values.PasstUplink(None)),
        ("passt:/run/passt", values.PasstUplink("/run/passt")),
    ],
)
def test_uplinks(text: str, uplink: values.UplinkConfig) -> None:
    assert values.parse_uplink(text) == uplink


@pytest.mark.parametrize(
    "text",
    [
        "",
        "none:",
        "tap",
        "tap:",
        "tap:a b",
        "tap:sixteen-bytes-xx",
        "tap-fd:",
        "tap-fd:2",
        "tap-fd:x",
        "datagram:/run/a",
        "datagram:/run/a,/run/b,/run/c",
        "stream:",
        "stream:@abstract",
        "stream-listen",
        "passt:",
        "TAP:vnet0",
        "bridge:br0",
    ],
)
def test_uplinks_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match=r"[;,]"):
        values.parse_uplink(text)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "not a MAC"),
        ("52:54:00:12:34", "not a MAC"),
        ("52-54-00-12-34-56", "not a MAC"),
        ("52:54:00:12:34:56\n", "not a MAC"),
        ("01:00:5e:00:00:01", "group address.*such as 00:00:5e:00:00:01"),
        ("ff:ff:ff:ff:ff:ff", "group address"),
        ("00:00:00:00:00:00", "no address"),
    ],
)
def test_mac_addresses_that_are_none(text: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        values.parse_mac(text)


@given(st.binary(min_size=6, max_size=6).filter(lambda mac: not mac[0] & 1 and any(mac)))
def test_mac_addresses_survive_being_written(mac: bytes) -> None:
    assert values.parse_mac(values.format_mac(mac)) == mac
    assert values.parse_mac(values.format_mac(mac).upper()) == mac


@given(st.lists(st.text(), min_size=1, max_size=3), st.binary(max_size=100))
def test_derived_addresses_are_local_unicast_and_stay_the_same(
    names: list[str], seed: bytes
) -> None:
    mac = values.derived_mac(*names, seed=seed)
    assert len(mac) == 6
    assert mac[0] & 0x0F == 2
    assert mac == values.derived_mac(*names, seed=seed)


def test_derived_addresses_depend_on_host_owner_and_member() -> None:
    macs = {
        values.derived_mac(owner, member, seed=seed)
        for owner in ("a", "b", "ab")
        for member in ("a", "b", "")
        for seed in (b"one", b"two")
    }
    assert len(macs) == 18


def test_this_host_has_a_seed() -> None:
    assert values.host_seed()


@pytest.mark.parametrize(
    ("text", "rate"),
    [("64000", 64_000), ("8bit", 8), ("64kbit", 64_000), ("5mbit", 5 * 10**6), ("1Gbit", 10**9)],
)
def test_rates(text: str, rate: int) -> None:
    assert values.parse_rate(text) == rate


@pytest.mark.parametrize("text", ["", "-1", "1.5gbit", "10 mbit", "1gbps", "9" * 30])
def test_rates_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="write bits per second"):
        values.parse_rate(text)


@pytest.mark.parametrize(("text", "mode"), [("0660", 0o660), ("600", 0o600), ("0777", 0o777)])
def test_modes(text: str, mode: int) -> None:
    assert values.parse_mode(text) == mode


@pytest.mark.parametrize("text", ["", "0o660", "888", "4755", "rw-rw----"])
def test_modes_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="octal"):
        values.parse_mode(text)


def test_socket_paths_fit_into_a_sockaddr() -> None:
    longest = "/" + "x" * (values.MAX_SOCKET_PATH - 1)
    assert values.parse_socket_path(longest) == longest
    with pytest.raises(ValueError, match=r"108 bytes.*at most 107"):
        values.parse_socket_path(longest + "x")
    with pytest.raises(ValueError, match="108 bytes"):
        values.parse_socket_path("/" + "x" * 105 + "é")


@given(st.text())
def test_every_grammar_refuses_only_by_value_error(text: str) -> None:
    for grammar in (
        values.parse_fd,
        values.parse_interface,
        values.parse_mac,
        values.parse_mode,
        values.parse_name,
        values.parse_number,
        values.parse_path,
        values.parse_rate,
        values.parse_socket_path,
        values.parse_uplink,
    ):
        try:
            grammar(text)
        except ValueError as error:
            assert str(error)  # noqa: PT017 - it need not be raised
