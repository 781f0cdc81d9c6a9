"""Images of device parts: walking them, what may follow the last part, and order."""

from __future__ import annotations

import errno
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.virtio.part_images import GOLDEN, IMAGE, PARTS
from vfio_user_virtio import limits
from vfio_user_virtio.errors import ClientError
from vfio_user_virtio.virtio.part_header import (
    PartHeader,
    PartType,
    encode_part_header,
    queue_selector,
    register_selector,
)
from vfio_user_virtio.virtio.parts import (
    Part,
    PartsError,
    canonical,
    decode_headers_untrusted,
    decode_part_list_untrusted,
    encode_headers,
    encode_part_list,
    encode_parts,
    first_out_of_order,
    first_repeated,
    image_size,
    image_untrusted,
    parse_parts_untrusted,
    strip_kernel_junk,
)

any_part = st.builds(
    Part,
    st.sampled_from(PartType) | st.integers(1, 0xFFFF),
    st.binary(max_size=20),
    st.binary(min_size=8, max_size=8),
    st.integers(0, 0xFF),
    st.integers(0, 0xFF),
)
images = st.lists(any_part, max_size=6)


# --- images -------------------------------------------------------------------------------------


def test_golden_image_both_ways() -> None:
    assert encode_parts(PARTS) == IMAGE
    assert image_size(PARTS) == len(IMAGE)
    found = parse_parts_untrusted(IMAGE)
    assert found == PARTS
    assert [part.name for part in found] == [name for name, _, _ in GOLDEN]
    offset = 0
    for part in found:
        assert part.offset == offset
        offset += 16 + part.header.length


def test_nothing_is_an_image() -> None:
    assert parse_parts_untrusted(b"") == []


@given(images)
def test_images_come_back(parts: list[Part]) -> None:
    raw = encode_parts(parts)
    assert parse_parts_untrusted(raw) == parts
    assert image_size(parts) == len(raw)


@given(images, st.integers(0, 100))
def test_zeros_may_follow_the_last_part(parts: list[Part], zeros: int) -> None:
    """Fewer than a header has, or a header of zeros and then nothing else."""
    assert parse_parts_untrusted(encode_parts(parts) + bytes(zeros)) == parts
    assert image_untrusted(bytearray(encode_parts(parts) + bytes(zeros))) == encode_parts(parts)


@given(images, st.integers(0, 50), st.integers(1, 255))
def test_nothing_else_may_follow(parts: list[Part], zeros: int, byte: int) -> None:
    raw = encode_parts(parts)
    with pytest.raises(PartsError) as caught:
        parse_parts_untrusted(raw + bytes(zeros) + bytes((byte,)))
    assert caught.value.offset == len(raw)
    assert caught.value.errno == errno.EINVAL
    with pytest.raises(PartsError):
        image_untrusted(raw + bytes(zeros) + bytes((byte,)))


def test_what_follows_is_named() -> None:
    with pytest.raises(PartsError) as caught:
        parse_parts_untrusted(IMAGE + b"12345")
    assert str(caught.value) == (
        f"no part at byte {len(IMAGE)}: the 5 bytes after part 0x201 0500000000000000 "
        "are neither a part nor zeros (EINVAL)"
    )
    with pytest.raises(PartsError, match="no part at byte 0: the 3 bytes at the start"):
        parse_parts_untrusted(b"abc")
    with pytest.raises(PartsError, match="the 33 bytes after"):
        parse_parts_untrusted(IMAGE + bytes(32) + b"\1")


@pytest.mark.parametrize("cut", range(len(IMAGE)))
def test_a_cut_image_is_refused_or_ends_with_a_part(cut: int) -> None:
    ends = [0]
    for part in parse_parts_untrusted(IMAGE):
        ends.append(ends[-1] + 16 + len(part.value))
    end = max(end for end in ends if end <= cut)
    if any(IMAGE[end:cut]):
        with pytest.raises(PartsError):
            parse_parts_untrusted(IMAGE[:cut])
    else:  # types end in a zero byte, which may be padding
        assert parse_parts_untrusted(IMAGE[:cut]) == PARTS[: ends.index(end)]


def test_a_value_that_is_not_all_there() -> None:
    raw = encode_parts(PARTS[:5])
    start = len(raw) - 17
    for there in (0, 12):
        header = encode_part_header(PartHeader(PartType.VQ_CFG, 0, queue_selector(3), 13))
        with pytest.raises(PartsError) as caught:
            parse_parts_untrusted(raw[:start] + header + bytes(there))
        assert caught.value.part == "VQ_CFG queue 3"
        assert caught.value.offset == start
        assert f"its value has 13 bytes, {there} are there" in str(caught.value)
        assert isinstance(caught.value, ClientError)


def test_a_value_that_is_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    header = encode_part_header(PartHeader(0x201, length=(1 << 32) - 1))
    with pytest.raises(PartsError, match="has 4294967295 bytes; the limit is 16777216"):
        parse_parts_untrusted(header)
    monkeypatch.setattr(limits, "MAX_PART_SIZE", 3)
    assert parse_parts_untrusted(encode_parts([Part(0x201, b"abc")]))
    with pytest.raises(PartsError, match="has 4 bytes; the limit is 3"):
        parse_parts_untrusted(encode_parts([Part(0x201, b"abcd")]))


def test_too_many_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_PARTS", 3)
    parts = [Part(0x201, b"ab")] * 3
    raw = encode_parts(parts)
    assert parse_parts_untrusted(raw + bytes(99)) == parts
    with pytest.raises(PartsError, match=r"^DEVICE_STATUS at byte 54: .* more than 3 parts"):
        parse_parts_untrusted(raw + encode_parts([Part(PartType.DEVICE_STATUS, b"\1")]))


def test_a_part_refuses_by_name() -> None:
    part = Part(PartType.DEVICE_STATUS, b"ab")
    assert str(part.refuse("odd")) == "DEVICE_STATUS: odd (EINVAL)"
    assert part.refuse("odd").offset is None
    part.require_size(2)
    with pytest.raises(PartsError, match="its value has 2 bytes, not 1"):
        part.require_size(1)
    (found,) = parse_parts_untrusted(encode_parts([part]))
    assert found == part
    assert str(found.refuse("odd")) == "DEVICE_STATUS at byte 0: odd (EINVAL)"


# --- junk of some kernels -----------------------------------------------------------------------


def filled(raw: bytes) -> bytes:
    """`raw` as a device answers it: zeros up to a multiple of 8."""
    return raw + bytes(-len(raw) % 8)


@given(images, st.binary(min_size=8, max_size=8))
def test_junk_is_stripped(parts: list[Part], junk: bytes) -> None:
    for raw in (encode_parts(parts), filled(encode_parts(parts))):
        assert strip_kernel_junk(raw + junk) == (raw, True)
        assert parse_parts_untrusted(raw) == parts


@given(images, st.binary(max_size=24))
def test_what_is_no_junk_stays(parts: list[Part], tail: bytes) -> None:
    image = encode_parts(parts)
    blob, stripped = strip_kernel_junk(image + tail)
    assert blob == (image + tail)[: len(blob)]
    assert len(image + tail) - len(blob) == 8 * stripped
    assert strip_kernel_junk(blob) == (blob, False), "there is only one status"


def test_images_without_junk() -> None:
    assert len(IMAGE) % 8 == 2
    tails = [b"", bytes(6), b"\1" * 7, b"\1" * 9, b"\1" * 14, bytes(12), bytes(16), bytes(24)]
    for tail in tails:
        assert strip_kernel_junk(IMAGE + tail) == (IMAGE + tail, False)
    cut = IMAGE[:-17]
    assert strip_kernel_junk(cut) == (cut, False), "which cannot be walked"


# --- headers alone ------------------------------------------------------------------------------

HEADERS = [part.header for part in PARTS]


def test_lists_of_headers_both_ways() -> None:
    raw = bytes.fromhex("".join(golden.replace(" ", "")[:32] for _, golden, _ in GOLDEN))
    assert encode_headers(HEADERS) == raw
    assert decode_headers_untrusted(raw) == HEADERS
    assert decode_headers_untrusted(raw + bytes(8)) == HEADERS, "padding"
    assert decode_headers_untrusted(raw + bytes(16) + raw) == HEADERS, "a header of zeros ends it"
    assert decode_headers_untrusted(raw[:-1]) == HEADERS[:-1], "only what is whole"
    assert decode_headers_untrusted(b"") == []


def test_too_many_headers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_PARTS", len(HEADERS))
    assert decode_headers_untrusted(encode_headers(HEADERS)) == HEADERS
    with pytest.raises(PartsError, match="more than 9 headers"):
        decode_headers_untrusted(encode_headers([*HEADERS, HEADERS[0]]))


def test_the_list_of_parts_both_ways() -> None:
    raw = encode_part_list(HEADERS)
    assert raw == bytes.fromhex("09000000 00000000") + encode_headers(HEADERS)
    assert decode_part_list_untrusted(raw) == HEADERS
    assert decode_part_list_untrusted(raw + bytes(8)) == HEADERS
    assert decode_part_list_untrusted(raw + encode_headers(HEADERS)) == HEADERS
    assert decode_part_list_untrusted(b"") == []


@pytest.mark.parametrize("count", [10, (1 << 32) - 1])
def test_a_list_that_counts_more_than_it_has(count: int) -> None:
    raw = struct.pack("<II", count, 0) + encode_headers(HEADERS)
    with pytest.raises(PartsError, match=f"the list of parts: it counts {count} and has 9"):
        decode_part_list_untrusted(raw)


@given(st.binary(max_size=100))
def test_any_list_of_parts(raw: bytes) -> None:
    try:
        headers = decode_part_list_untrusted(raw)
    except PartsError:
        return
    assert encode_headers(headers) == raw[8 : 8 + 16 * len(headers)]


# --- order --------------------------------------------------------------------------------------


@given(st.permutations(PARTS))
def test_the_canonical_order(parts: list[Part]) -> None:
    assert canonical(parts) == PARTS
    assert first_out_of_order(canonical(parts)) is None


def test_order_that_the_standard_demands() -> None:
    status, features = Part(PartType.DEVICE_STATUS, b"\1"), Part(PartType.DEV_FEATURES, bytes(8))
    queues = [Part(PartType.VQ_CFG, bytes(32), queue_selector(n)) for n in (1, 0)]
    registers = [Part(PartType.PCI_COMMON_CFG, bytes(4), register_selector(n)) for n in (8, 0)]
    free = [Part(0x200, b""), Part(0x106, b""), Part(0xFF, b"")]
    assert first_out_of_order([features, *registers, status, *queues]) is None
    assert first_out_of_order([queues[0], *free, queues[1]]) is None
    assert first_out_of_order([*queues, *free, status, features]) is status
    assert first_out_of_order([status, *registers]) is registers[0]


def test_parts_of_the_same_thing() -> None:
    queues = [Part(PartType.VQ_CFG, bytes(32), queue_selector(n)) for n in (1, 0, 1)]
    assert first_repeated(queues[:2]) is None
    assert first_repeated(queues) is queues[2]
    assert first_repeated(PARTS) is None
    assert first_repeated([*PARTS, Part(PartType.DEVICE_STATUS, b"\1")]) is not None
