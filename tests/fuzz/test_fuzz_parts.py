"""The fuzz target of device parts, on hypothesis' bytes: it runs, and it can find something."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.fuzz import fuzz_parts
from tests.virtio.part_images import IMAGE, PARTS
from vfio_user_virtio.errors import ClientError
from vfio_user_virtio.virtio.part_header import (
    ControlCommand,
    PartHeader,
    PartType,
    control_selector,
    encode_part_header,
    queue_selector,
    register_selector,
)
from vfio_user_virtio.virtio.parts import Part, PartsError, encode_parts

selectors = (
    st.sampled_from(ControlCommand).map(control_selector)
    | st.integers(0, 9).map(queue_selector)
    | st.integers(0, 64).map(register_selector)
    | st.binary(min_size=8, max_size=8)
)
headers = st.builds(
    PartHeader,
    st.sampled_from(PartType) | st.integers(0, 0x210),
    st.sampled_from([0, 1]) | st.integers(0, 255),
    selectors,
    st.sampled_from([0, 1, 2, 4, 8, 16, 32]) | st.integers(0, 64) | st.integers(0, (1 << 32) - 1),
)
likely_parts = st.builds(
    Part,
    st.sampled_from(PartType),
    st.sampled_from([0, 1, 2, 4, 6, 8, 16, 32]).map(bytes) | st.binary(max_size=40),
    selectors,
)
tails = st.integers(0, 40).map(bytes) | st.binary(max_size=24)


@given(st.binary(max_size=200))
@example(b"")
@example(IMAGE)
@example(IMAGE + bytes(6) + b"\xff" * 8)
def test_any_bytes(data: bytes) -> None:
    fuzz_parts.one_input(data)


@given(st.lists(headers.map(encode_part_header), max_size=4), st.binary(max_size=80))
def test_likely_headers(first: list[bytes], tail: bytes) -> None:
    fuzz_parts.one_input(b"".join(first) + tail)


@given(st.lists(likely_parts, max_size=6), tails)
def test_likely_images(parts: list[Part], tail: bytes) -> None:
    fuzz_parts.one_input(encode_parts(parts) + tail)


@given(st.integers(0, 20), st.lists(headers.map(encode_part_header), max_size=4))
def test_likely_lists(count: int, listed: list[bytes]) -> None:
    fuzz_parts.one_input(count.to_bytes(8, "little") + b"".join(listed))


def test_it_reaches_whole_images() -> None:
    assert fuzz_parts.parsed(IMAGE) == PARTS
    assert fuzz_parts.expected(IMAGE) is not None


def test_it_finds_another_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(blob: bytes) -> list[Part]:
        raise ClientError(22, "not the one")

    monkeypatch.setattr(fuzz_parts, "parse_parts_untrusted", refuse)
    with pytest.raises(ClientError):
        fuzz_parts.one_input(IMAGE)


def test_it_finds_a_part_too_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz_parts, "parse_parts_untrusted", lambda blob: PARTS[:-1])
    with pytest.raises(AssertionError, match="as the format says"):
        fuzz_parts.one_input(IMAGE)


def test_it_finds_an_image_written_back_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz_parts, "encode_parts", lambda parts: b"\xff" + IMAGE[1:])
    with pytest.raises(AssertionError, match="written back as it came"):
        fuzz_parts.one_input(IMAGE)


def test_it_finds_a_value_decoder_that_blames_another(monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(part: Part) -> bytes:
        raise PartsError("another part", part.offset, "odd")

    monkeypatch.setattr(fuzz_parts, "decode_value_untrusted", decode)
    with pytest.raises(AssertionError):
        fuzz_parts.one_input(IMAGE)


def test_it_finds_too_much_stripped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz_parts, "strip_kernel_junk", lambda blob: (blob[:-8], True))
    with pytest.raises(AssertionError):
        fuzz_parts.one_input(IMAGE)
