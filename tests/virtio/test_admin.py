"""Framing of administration commands: lengths of any kind, bitmaps, names."""

from __future__ import annotations

import errno

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfio_user_virtio.virtio.admin import (
    CAPABILITY_OPCODES,
    DEV_PARTS_OPCODES,
    LEGACY_OPCODES,
    Answer,
    Command,
    GroupType,
    Opcode,
    Qualifier,
    Status,
    decode_answer_untrusted,
    decode_bits_untrusted,
    decode_command_untrusted,
    encode_answer,
    encode_bits,
    encode_command,
    fitted,
    opcode_name,
    padded,
)

u16 = st.integers(0, 0xFFFF)
u64 = st.integers(0, (1 << 64) - 1)


def mask(numbers: frozenset[Opcode]) -> int:
    return int.from_bytes(encode_bits(numbers), "little")


def test_masks_of_the_standard() -> None:
    assert mask(DEV_PARTS_OPCODES) == 0x3FC00
    assert mask(CAPABILITY_OPCODES) == 0x380
    assert mask(LEGACY_OPCODES) == 0x7C
    assert [*Opcode] == [*range(0x12)]


def test_statuses_are_errno_values() -> None:
    for status in Status:
        if status is not Status.OK:
            assert getattr(errno, status.name) == status


# --- commands -----------------------------------------------------------------------------------


def test_a_command_shorter_than_its_header_reads_zeros() -> None:
    assert decode_command_untrusted(b"") == Command(0, 0, 0)
    assert decode_command_untrusted(b"\x11\0\1") == Command(0x11, 1, 0)
    raw = encode_command(Command(Opcode.DEV_MODE_SET, GroupType.SR_IOV, 0x0102))
    assert decode_command_untrusted(raw[:17]) == Command(0x11, 1, 2)


def test_reserved_bytes_are_ignored() -> None:
    raw = bytearray(encode_command(Command(Opcode.LIST_QUERY, GroupType.SELF, 7)))
    raw[4:16] = b"\xff" * 12
    assert decode_command_untrusted(bytes(raw)) == Command(0, 0, 7)


def test_only_the_legacy_writes_are_not_padded() -> None:
    for opcode in Opcode:
        raw = encode_command(Command(opcode, 1, 1, b"abc"))
        writes = (Opcode.LEGACY_COMMON_CFG_WRITE, Opcode.LEGACY_DEV_CFG_WRITE)
        assert len(raw) == (27 if opcode in writes else 32), opcode.name


@given(u16, u16, u64, st.binary(max_size=40))
def test_commands_come_back_with_padding(op: int, group: int, member: int, data: bytes) -> None:
    command = decode_command_untrusted(encode_command(Command(op, group, member, data)))
    assert (command.opcode, command.group_type, command.member_id) == (op, group, member)
    assert command.data[: len(data)] == data
    assert len(command.data) - len(data) < 8
    assert not any(command.data[len(data) :])


# --- answers ------------------------------------------------------------------------------------

ANSWER = Answer(Status.EINVAL, Qualifier.INVALID_FIELD, b"12345")
ANSWER_HEX = "1600 0300 00000000 3132333435 000000"


def test_answer_both_ways() -> None:
    written = encode_answer(ANSWER, 4096)
    assert written == bytes.fromhex(ANSWER_HEX)
    answer = decode_answer_untrusted(written)
    assert answer == Answer(Status.EINVAL, Qualifier.INVALID_FIELD, b"12345\0\0\0")


@pytest.mark.parametrize("writable", range(17))
def test_an_answer_is_cut_to_fit(writable: int) -> None:
    written = encode_answer(ANSWER, writable)
    assert written == bytes.fromhex(ANSWER_HEX)[:writable]
    answer = decode_answer_untrusted(written)
    if writable < 8:
        assert answer is None
    else:
        assert answer is not None
        assert not answer.ok
        assert answer.result == b"12345\0\0\0"[: writable - 8]


def test_reserved_bytes_of_a_status_are_ignored() -> None:
    assert decode_answer_untrusted(bytes(4) + b"\xff" * 4) == Answer(Status.OK)


@given(u16, u16, st.binary(max_size=40))
def test_answers_come_back_with_padding(status: int, qualifier: int, result: bytes) -> None:
    answer = decode_answer_untrusted(encode_answer(Answer(status, qualifier, result), 48))
    assert answer == Answer(status, qualifier, padded(result))
    assert answer.ok == (status == 0)
    assert answer.describe()


def test_answers_by_name() -> None:
    assert Answer(0).describe() == "OK (OK)"
    assert Answer(28, 6).describe() == "ENOSPC (NORESOURCE)"
    assert Answer(77, 8).describe() == "0x4d (0x8)"
    assert Answer(28).errno == errno.ENOSPC
    assert Answer(17).errno == errno.EEXIST
    assert Answer(77).errno == errno.EINVAL, "as the standard says of an unknown status"


def test_opcodes_by_name() -> None:
    assert opcode_name(0x10) == "DEV_PARTS_SET"
    assert opcode_name(0x12) == "0x12", "a hole in the standard's table"


# --- lengths and bitmaps ------------------------------------------------------------------------


def test_padding() -> None:
    assert [len(padded(bytes(n))) for n in (0, 1, 7, 8, 9)] == [0, 8, 8, 8, 16]


def test_fitting() -> None:
    assert fitted(b"abc", 5) == b"abc\0\0"
    assert fitted(b"abc", 2) == b"ab"


@pytest.mark.parametrize(
    ("highest", "words"), [(0, 1), (1, 1), (63, 1), (64, 2), (127, 2), (128, 3), (0x804, 33)]
)
def test_a_bitmap_reaches_its_highest_number(highest: int, words: int) -> None:
    raw = encode_bits([highest])
    assert len(raw) == 8 * words, "ceil((highest + 1) / 64): the + 1 that the shorthand forgets"
    assert decode_bits_untrusted(raw) == {highest}


def test_bitmaps_both_ways() -> None:
    assert encode_bits(()) == bytes(8), "one word at least"
    assert encode_bits([0, 1, 9]) == bytes.fromhex("0302000000000000")
    assert decode_bits_untrusted(bytes.fromhex("0302000000000000")) == {0, 1, 9}
    assert decode_bits_untrusted(b"") == frozenset()
    assert decode_bits_untrusted(b"\x81") == {0, 7}, "cut within a word"
    assert decode_bits_untrusted(b"\x01" + bytes(99)) == {0}, "more words than needed"


def test_bits_that_no_opcode_can_have_are_not_looked_at() -> None:
    assert decode_bits_untrusted(bytes(8191) + b"\x80\x01") == {0xFFFF}


@given(st.frozensets(u16, max_size=20), st.integers(0, 3))
def test_bitmaps_come_back(numbers: frozenset[int], more_words: int) -> None:
    assert decode_bits_untrusted(encode_bits(numbers) + bytes(8 * more_words)) == numbers
