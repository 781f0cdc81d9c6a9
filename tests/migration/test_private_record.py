"""Our record: golden, round trip, every malformation, what a newer source may add."""

from __future__ import annotations

import errno
import struct
from typing import Final

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.migration.golden_streams import golden
from vfio_user_virtio import limits
from vfio_user_virtio.errors import ClientError
from vfio_user_virtio.migration.private_record import (
    PRIVATE_TAG,
    PrivateState,
    decode_private_untrusted,
    describe,
    encode_private,
    lost_on_linux,
)
from vfio_user_virtio.virtio.net_config import NetStatus

GOLDEN: Final = PrivateState(
    guest_offloads=0x182,
    mac=bytes.fromhex("525400123456"),
    status=NetStatus.LINK_UP | NetStatus.ANNOUNCE,
    config_generation=42,
    isr=3,
)
VERSION_1: Final = bytes.fromhex("01000000")


def field(number: int, value: bytes) -> bytes:
    return struct.pack("<HHI", number, 0, len(value)) + value


def refusal(payload: bytes) -> ClientError:
    with pytest.raises(ClientError) as caught:
        decode_private_untrusted(payload)
    return caught.value


def test_tag() -> None:
    assert PRIVATE_TAG.to_bytes(4, "little") == b"vvun"


def test_golden_both_ways() -> None:
    payload = golden("private")[-62:]
    assert encode_private(GOLDEN) == payload
    assert decode_private_untrusted(payload) == (GOLDEN, ())


def test_golden_of_a_newer_source() -> None:
    state, notes = decode_private_untrusted(golden("private_newer"))
    assert state == PrivateState(config_generation=42)
    assert [note.partition(" of ")[0] for note in notes] == [
        "field 9 (3 bytes)",
        "field 65535 (0 bytes)",
    ]


states = st.builds(
    PrivateState,
    guest_offloads=st.none() | st.integers(0, 2**64 - 1),
    mac=st.none() | st.binary(min_size=6, max_size=6),
    status=st.none() | st.integers(0, 3).map(NetStatus),
    config_generation=st.none() | st.integers(0, 255),
    isr=st.none() | st.integers(0, 3),
)


@given(states)
def test_round_trip(state: PrivateState) -> None:
    payload = encode_private(state)
    assert decode_private_untrusted(payload) == (state, ())
    assert tuple(describe(state)) == lost_on_linux(state)
    present = [name for name, value in attrs.asdict(state).items() if value is not None]
    assert list(lost_on_linux(state)) == present


@given(states, st.data())
def test_truncation_never_passes_for_the_whole(state: PrivateState, data: st.DataObject) -> None:
    payload = encode_private(state)
    cut = data.draw(st.integers(0, len(payload) - 1))
    try:
        found, _ = decode_private_untrusted(payload[:cut])
    except ClientError as error:
        assert error.errno == errno.EINVAL  # noqa: PT017 - a cut between two fields is no error
    else:
        assert payload.startswith(encode_private(found))
        assert found != state


@given(st.binary(max_size=80) | st.binary(max_size=80).map(VERSION_1.__add__))
def test_any_bytes(payload: bytes) -> None:
    try:
        state, notes = decode_private_untrusted(payload)
    except ClientError:
        return
    assert decode_private_untrusted(encode_private(state)) == (state, ())
    assert len(notes) <= limits.MAX_PRIVATE_FIELDS


@pytest.mark.parametrize(
    ("payload", "says"),
    [
        (b"", "has 0 bytes, 4 are needed"),
        (b"\1\0\0", "has 3 bytes"),
        (VERSION_1 + bytes(7), "ends inside the head of a field, at byte 11"),
        (VERSION_1 + field(4, b"*")[:-1], "field 4 has 1 bytes, 0 are left"),
        (VERSION_1 + struct.pack("<HHI", 9, 0, 2**32 - 1), "field 9 has 4294967295 bytes"),
        (VERSION_1 + field(4, b"*") * 2, "field 4 is there twice"),
        (VERSION_1 + field(9, b"*") * 2, "field 9 is there twice"),
        (VERSION_1 + field(1, bytes(7)), "guest_offloads has 7 bytes, not 8"),
        (VERSION_1 + field(2, bytes(8)), "mac has 8 bytes, not 6"),
        (VERSION_1 + field(3, b""), "status has 0 bytes"),
        (VERSION_1 + field(3, b"\4\0"), "status is 0x4; only the bits 0x3"),
        (VERSION_1 + field(5, b"\xff"), "isr is 0xff"),
        (VERSION_1 + bytes(limits.MAX_PRIVATE_RECORD), "at most 16384 are taken"),
    ],
)
def test_malformed(payload: bytes, says: str) -> None:
    error = refusal(payload)
    assert error.errno == errno.EINVAL
    assert says in str(error)


def test_number_of_fields() -> None:
    most = [field(100 + n, b"") for n in range(limits.MAX_PRIVATE_FIELDS)]
    assert len(decode_private_untrusted(VERSION_1 + b"".join(most))[1]) == len(most)
    error = refusal(VERSION_1 + b"".join(most) + field(1, bytes(8)))
    assert error.errno == errno.EINVAL
    assert "more than 64 fields" in str(error)


def test_another_version_is_refused() -> None:
    for version in (0, 2, 65535):
        error = refusal(struct.pack("<HH", version, 0) + encode_private(GOLDEN)[4:])
        assert error.errno == errno.EOPNOTSUPP
        assert f"version {version}, this server reads 1" in str(error)


def test_describe_is_by_name() -> None:
    assert describe(GOLDEN) == {
        "guest_offloads": "GUEST_CSUM|GUEST_TSO4|GUEST_TSO6",
        "mac": "52:54:00:12:34:56",
        "status": "LINK_UP|ANNOUNCE",
        "config_generation": "42",
        "isr": "queue|configuration",
    }
    quiet = PrivateState(guest_offloads=0, status=NetStatus(0), isr=0)
    assert describe(quiet) == {"guest_offloads": "none", "status": "none", "isr": "none"}
    assert describe(PrivateState()) == {}
    assert describe(PrivateState(isr=2)) == {"isr": "configuration"}


def test_announce_pending() -> None:
    assert GOLDEN.announce_pending
    assert not PrivateState(status=NetStatus.LINK_UP).announce_pending
    assert not PrivateState().announce_pending
