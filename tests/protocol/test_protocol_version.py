from __future__ import annotations

import errno
import json
import struct

import attrs
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from vfio_user_virtio.errors import ConnectionLost
from vfio_user_virtio.limits import MAX_VERSION_JSON, MAX_VERSION_REPLY_SIZE
from vfio_user_virtio.protocol.header import HEADER_SIZE
from vfio_user_virtio.protocol.version import (
    OWN_CAPABILITIES,
    Capabilities,
    MigrationCapability,
    TwinSocketCapability,
    Version,
    decode_version_reply_untrusted,
    decode_version_request_untrusted,
    encode_version,
    negotiate,
)

QEMU_JSON = (
    b'{"capabilities": {"pgsizes": 4096, "max_msg_fds": 16, "max_dma_maps": 65535, '
    b'"max_data_xfer_size": 1048576, "migration": {"max_bitmap_size": 268435456, '
    b'"pgsize": 4096}, "write_multiple": true}}\0'
)
"""What QEMU 11.1.3 proposes, byte for byte."""

QEMU_CAPABILITIES = Capabilities(
    max_msg_fds=16,
    max_data_xfer_size=1_048_576,
    pgsizes=4096,
    max_dma_maps=65_535,
    write_multiple=True,
    migration=MigrationCapability(4096, 268_435_456),
)


def request(document: object, major: int = 0, minor: int = 0) -> bytes:
    text = document if isinstance(document, bytes) else json.dumps(document).encode() + b"\0"
    return struct.pack("<HH", major, minor) + text


def refused(payload: bytes, num_fds: int = 0) -> str:
    with pytest.raises(ConnectionLost) as caught:
        decode_version_request_untrusted(payload, num_fds)
    assert caught.value.reply_errno == errno.EINVAL
    return str(caught.value)


def test_qemus_proposal() -> None:
    payload = request(QEMU_JSON)
    assert HEADER_SIZE + len(payload) == MAX_VERSION_REPLY_SIZE
    assert decode_version_request_untrusted(payload) == Version(0, 0, QEMU_CAPABILITIES)


def test_the_full_answer_fits_qemus_buffer() -> None:
    reply = negotiate(Version(0, 0, QEMU_CAPABILITIES))
    assert reply == Version(0, 0, QEMU_CAPABILITIES)
    payload = encode_version(reply)
    assert HEADER_SIZE + len(payload) <= MAX_VERSION_REPLY_SIZE
    assert payload[-1] == 0
    document = json.loads(payload[4:-1])
    assert list(document) == ["capabilities"]
    assert set(document["capabilities"]) == {
        "max_msg_fds",
        "max_data_xfer_size",
        "pgsizes",
        "max_dma_maps",
        "write_multiple",
        "migration",
    }
    assert decode_version_reply_untrusted(payload) == reply


def test_the_largest_answer_without_twin_socket_fits_qemus_buffer() -> None:
    most = negotiate(
        Version(0, 0, attrs.evolve(QEMU_CAPABILITIES, write_multiple=False))
    ).capabilities
    assert most.migration is not None
    payload = encode_version(Version(0, 0, most))
    assert HEADER_SIZE + len(payload) <= MAX_VERSION_REPLY_SIZE


@pytest.mark.parametrize("document", [b"", b"{}\0", b'{"capabilities":{}}\0', b'{"x":1}\0'])
def test_defaults_of_the_specification(document: bytes) -> None:
    version = decode_version_request_untrusted(request(document))
    assert version.capabilities == Capabilities(1, 1_048_576, 4096, 65_535, False, None, None)
    payload = encode_version(negotiate(version))
    assert set(json.loads(payload[4:-1])["capabilities"]) == {
        "max_msg_fds",
        "max_data_xfer_size",
        "pgsizes",
        "max_dma_maps",
        "write_multiple",
    }


def test_unknown_keys_are_ignored_on_every_level() -> None:
    document = {
        "more": [],
        "capabilities": {"max_msg_fds": 3, "new": None, "migration": {"new": [1.5]}},
    }
    found = decode_version_request_untrusted(request(document)).capabilities
    assert found == Capabilities(max_msg_fds=3, migration=MigrationCapability())


def test_minor_is_never_above_our_own() -> None:
    version = decode_version_request_untrusted(request(b"", minor=99))
    assert version.minor == 99
    assert negotiate(version).minor == 0


def test_another_major_is_refused() -> None:
    assert "asks for 1.x" in refused(request(b"", major=1))


def test_fds_are_refused() -> None:
    assert "2 file descriptors" in refused(request(b""), 2)


@pytest.mark.parametrize("length", range(4))
def test_short_payload(length: int) -> None:
    assert "holds no version" in refused(bytes(length))


DEEP = MAX_VERSION_JSON - 1


@pytest.mark.parametrize(
    ("document", "says"),
    [
        (b"{}", "does not end in NUL"),
        (b"\0", "not JSON"),
        (b"{\0", "not JSON"),
        (b"{}\0\0", "not JSON"),
        (b"\xff\xfe{}\0", "not JSON"),
        (b"\xef\xbb\xbf{}\0", "not JSON"),
        (b"[" * DEEP + b"\0", "not JSON"),
        (b'{"a":' * (DEEP // 5) + b"\0", "not JSON"),
        (b'{"a": NaN}\0', "NaN is not JSON"),
        (b'{"a": -Infinity}\0', "-Infinity is not JSON"),
        (b'{"a": 1, "a": 2}\0', "stands twice"),
        (b'{"capabilities": {"a": 1, "a": 2}}\0', "stands twice"),
        (b"[]\0", "not an object"),
        (b'"x"\0', "not an object"),
        (b"7\0", "not an object"),
        (b"{}" + b" " * MAX_VERSION_JSON + b"\0", f"at most {MAX_VERSION_JSON} are read"),
        (b'{"capabilities": []}\0', "capabilities list is not an object"),
        (b'{"capabilities": null}\0', "capabilities None is not an object"),
    ],
)
def test_hostile_documents(document: bytes, says: str) -> None:
    assert says in refused(request(document))


def test_a_value_that_nests_as_deep_as_the_parser_goes() -> None:
    """Its repr could recurse where the parser just did not, so it is never made."""
    for depth in range(100, 2000, 7):
        value = b"[" * depth + b"]" * depth
        refused(request(b'{"capabilities": {"max_msg_fds": ' + value + b"}}\0"))


@pytest.mark.parametrize(
    ("capability", "value"),
    [
        ("max_msg_fds", -1),
        ("max_msg_fds", 254),
        ("max_msg_fds", 5000),
        ("max_msg_fds", "16"),
        ("max_msg_fds", True),
        ("max_msg_fds", 1.0),
        ("max_msg_fds", None),
        ("max_msg_fds", {}),
        ("max_data_xfer_size", 0),
        ("max_data_xfer_size", 1 << 64),
        ("max_dma_maps", -1),
        ("max_dma_maps", 10**3000),
        ("pgsizes", 0),
        ("pgsizes", -4096),
        ("write_multiple", 1),
        ("write_multiple", "true"),
        ("migration", True),
        ("migration", []),
        ("migration", {"pgsize": 0}),
        ("migration", {"pgsize": 4097}),
        ("migration", {"max_bitmap_size": -1}),
        ("twin_socket", True),
        ("twin_socket", {"supported": 1}),
        ("twin_socket", {"fd_index": -1}),
        ("twin_socket", {"fd_index": 253}),
        ("twin_socket", {"fd_index": "0"}),
    ],
)
def test_hostile_values(capability: str, value: object) -> None:
    says = refused(request({"capabilities": {capability: value}}))
    assert capability in says or any(
        key in says for key in ("pgsize", "max_bitmap", "fd_index", "supported")
    )
    assert len(says) < 200


def test_negotiation_takes_the_lesser_of_each() -> None:
    client = Capabilities(
        max_msg_fds=8,
        max_data_xfer_size=65_536,
        pgsizes=0x201000,
        max_dma_maps=1,
        write_multiple=True,
        migration=MigrationCapability(8192, 4096),
    )
    own = Capabilities(
        max_msg_fds=16,
        max_data_xfer_size=1 << 20,
        pgsizes=0x1000,
        max_dma_maps=100,
        write_multiple=False,
        migration=MigrationCapability(4096, 1 << 20),
    )
    assert negotiate(Version(0, 0, client), own).capabilities == Capabilities(
        max_msg_fds=8,
        max_data_xfer_size=65_536,
        pgsizes=0x1000,
        max_dma_maps=1,
        write_multiple=False,
        migration=MigrationCapability(4096, 4096),
    )


def test_no_common_page_size() -> None:
    with pytest.raises(ConnectionLost, match="pgsizes 0x200000, none of 0x1000") as caught:
        negotiate(Version(0, 0, Capabilities(pgsizes=0x200000)))
    assert caught.value.reply_errno == errno.EINVAL


@pytest.mark.parametrize(
    ("asked", "own", "granted"),
    [
        (None, TwinSocketCapability(True), None),
        (TwinSocketCapability(True), None, None),
        (TwinSocketCapability(True), TwinSocketCapability(True), TwinSocketCapability(True, 0)),
        (TwinSocketCapability(False), TwinSocketCapability(True), TwinSocketCapability(False)),
        (TwinSocketCapability(True), TwinSocketCapability(False), TwinSocketCapability(False)),
    ],
)
def test_twin_socket(
    asked: TwinSocketCapability | None,
    own: TwinSocketCapability | None,
    granted: TwinSocketCapability | None,
) -> None:
    proposal = Version(0, 0, Capabilities(max_msg_fds=1, twin_socket=asked))
    reply = negotiate(proposal, Capabilities(max_msg_fds=16, twin_socket=own))
    assert reply.capabilities.twin_socket == granted
    num_fds = 1 if granted and granted.supported else 0
    assert decode_version_reply_untrusted(encode_version(reply), num_fds) == reply


def test_no_twin_socket_for_a_client_that_takes_no_fds() -> None:
    proposal = Version(0, 0, Capabilities(0, twin_socket=TwinSocketCapability(True)))
    assert negotiate(proposal).capabilities.twin_socket == TwinSocketCapability(False)


def test_migration_is_answered_only_if_both_have_it() -> None:
    own = Capabilities(migration=None)
    asked = Version(0, 0, Capabilities(migration=MigrationCapability()))
    assert negotiate(asked, own).capabilities.migration is None
    assert negotiate(Version(0, 0, Capabilities())).capabilities.migration is None


@pytest.mark.parametrize(
    ("reply", "num_fds", "says"),
    [
        (Version(1, 0, Capabilities()), 0, "speaks 1.0"),
        (Version(0, 1, Capabilities()), 0, "speaks 0.1"),
        (Version(0, 0, Capabilities(twin_socket=TwinSocketCapability(True))), 1, "twin_socket"),
        (Version(0, 0, Capabilities(twin_socket=TwinSocketCapability(True, 0))), 0, "twin_socket"),
        (Version(0, 0, Capabilities(twin_socket=TwinSocketCapability(True, 2))), 2, "twin_socket"),
        (Version(0, 0, Capabilities(twin_socket=TwinSocketCapability(False, 0))), 0, "twin_socket"),
    ],
)
def test_bad_replies(reply: Version, num_fds: int, says: str) -> None:
    with pytest.raises(ConnectionLost, match=says) as caught:
        decode_version_reply_untrusted(encode_version(reply), num_fds)
    assert caught.value.reply_errno == 0


def test_malformed_reply_is_not_answered() -> None:
    with pytest.raises(ConnectionLost, match="the reply to VERSION: the JSON is not") as caught:
        decode_version_reply_untrusted(request(b"[]\0"))
    assert caught.value.reply_errno == 0


u64 = st.integers(0, (1 << 64) - 1)
capabilities = st.builds(
    Capabilities,
    st.integers(0, 253),
    st.integers(1, (1 << 64) - 1),
    st.integers(1, (1 << 64) - 1),
    u64,
    st.booleans(),
    st.none()
    | st.builds(MigrationCapability, st.integers(1, 1 << 40).map(lambda n: n * 4096), u64),
    st.none() | st.builds(TwinSocketCapability, st.booleans(), st.none() | st.integers(0, 252)),
)


@given(capabilities, st.integers(0, 0xFFFF))
def test_round_trip(proposed: Capabilities, minor: int) -> None:
    version = Version(0, minor, proposed)
    assert decode_version_request_untrusted(encode_version(version)) == version


@given(capabilities)
def test_the_answer_never_exceeds_the_proposal(asked: Capabilities) -> None:
    if not asked.pgsizes & OWN_CAPABILITIES.pgsizes:
        return
    granted = negotiate(Version(0, 0, asked)).capabilities
    assert granted.max_msg_fds <= asked.max_msg_fds
    assert granted.max_data_xfer_size <= asked.max_data_xfer_size
    assert granted.pgsizes & ~asked.pgsizes == 0
    assert granted.max_dma_maps <= asked.max_dma_maps
    assert granted.write_multiple <= asked.write_multiple
    assert (granted.migration is None) == (asked.migration is None)
    assert (granted.twin_socket is None) == (asked.twin_socket is None)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda children: (
        st.lists(children, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "max_msg_fds",
                    "pgsizes",
                    "migration",
                    "twin_socket",
                    "pgsize",
                    "supported",
                    "fd_index",
                    "capabilities",
                    "write_multiple",
                    "?",
                ]
            ),
            children,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(st.binary(max_size=200) | json_values.map(lambda value: request({"capabilities": value})))
@example(b'\0\0\0\0{"capabilities":{"pgsizes":1e999}}\0')
def test_any_bytes(payload: bytes) -> None:
    for decode in (decode_version_request_untrusted, decode_version_reply_untrusted):
        try:
            found = decode(payload)
        except ConnectionLost:
            continue
        assert found.major == 0
