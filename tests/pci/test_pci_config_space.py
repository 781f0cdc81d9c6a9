"""Configuration space: identity, BAR sizing, the chains, watches, traps, events."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfio_user_virtio.errors import ClientError
from vfio_user_virtio.pci.config_space import (
    BASE_ADDRESS,
    CAPABILITIES_POINTER,
    COMMAND,
    CONFIG_SIZE,
    EXTENDED_START,
    INTERRUPT_LINE,
    INTERRUPT_PIN,
    STATUS,
    Command,
    ConfigEvents,
    ConfigSpace,
    Identity,
    MemoryBar,
    Status,
)
from vfio_user_virtio.pci.msix import MsixCapability
from vfio_user_virtio.pci.pcie_capability import add_pcie_capability
from vfio_user_virtio.pci.power_management import PowerManagement

if TYPE_CHECKING:
    from collections.abc import Iterator

IDENTITY = Identity(0x1AF4, 0x1041, 0x020000, 0x01, 0x1AF4, 0x0041)


def bare(**arguments: int) -> ConfigSpace:
    return ConfigSpace(IDENTITY, {}, **arguments)


def function() -> ConfigSpace:
    """A function with everything: both kinds of BAR, three capabilities and a vendor's."""
    config = ConfigSpace(
        IDENTITY, {0: MemoryBar(0x1000), 2: MemoryBar(0x8000, is_64bit=True, prefetchable=True)}
    )
    add_pcie_capability(config)
    PowerManagement(config)
    MsixCapability(config, 9, table_bar=0, table_offset=0, pba_bar=0, pba_offset=0x800)
    config.add_capability(0x09, bytes([16, 4]) + bytes(12), bytes(6) + b"\xff" * 8)
    config.add_extended_capability(0x0003, 1, bytes(range(8)))
    config.add_extended_capability(0x000B, 1, bytes(8), None, b"\xff" * 8)
    return config


def capabilities(config: ConfigSpace) -> Iterator[tuple[int, int]]:
    """(offset, ID) along the chain as a driver walks it, at most 64 steps."""
    pointer = config.read(CAPABILITIES_POINTER, 1)[0]
    for _ in range(64):
        if not pointer:
            return
        capability_id, following = config.read(pointer, 2)
        yield pointer, capability_id
        pointer = following
    raise AssertionError("the chain does not end")


def extended_capabilities(config: ConfigSpace) -> Iterator[tuple[int, int, int]]:
    """(offset, ID, version) along the extended chain."""
    offset = EXTENDED_START
    for _ in range(960):
        header = int.from_bytes(config.read(offset, 4), "little")
        if header:
            yield offset, header & 0xFFFF, header >> 16 & 0xF
        offset = header >> 20
        if not offset:
            return
    raise AssertionError("the chain does not end")


def test_identity_is_where_pci_has_it() -> None:
    config = bare(interrupt_pin=2)
    assert config.read(0, 4) == bytes.fromhex("f41a4110")
    assert config.read(8, 4) == bytes.fromhex("01000002")
    assert config.read(0x2C, 4) == bytes.fromhex("f41a4100")
    assert config.read(INTERRUPT_PIN, 1) == b"\2"
    assert config.read(0x0E, 1) == b"\0"


def test_empty_chains_are_empty() -> None:
    config = bare()
    assert config.read(CAPABILITIES_POINTER, 1) == b"\0"
    assert config.read(EXTENDED_START, 4) == bytes(4)
    assert not config.read(STATUS, 1)[0] & Status.CAPABILITIES_LIST


def test_the_chain_goes_in_the_order_of_adding() -> None:
    config = function()
    assert list(capabilities(config)) == [(0x40, 0x10), (0x7C, 0x01), (0x84, 0x11), (0x90, 0x09)]
    assert list(extended_capabilities(config)) == [(0x100, 3, 1), (0x10C, 0x0B, 1)]
    assert config.read(STATUS, 1)[0] & Status.CAPABILITIES_LIST
    assert config.read(0x104, 8) == bytes(range(8))


def test_capabilities_are_aligned_to_dwords() -> None:
    config = bare()
    assert config.add_capability(0x09, bytes(3)) == 0x40
    assert config.add_capability(0x09, bytes(2)) == 0x48
    assert config.add_capability(0x09, bytes(2)) == 0x4C


def test_the_whole_space_reads_at_once_and_in_bytes() -> None:
    config = function()
    whole = config.read(0, CONFIG_SIZE)
    assert len(whole) == CONFIG_SIZE
    assert config.read(0, 256) == whole[:256]
    assert b"".join(config.read(offset, 1) for offset in range(CONFIG_SIZE)) == whole


@pytest.mark.parametrize(
    ("bar", "offset", "sized"),
    [
        (MemoryBar(16), 0x18, "f0ffffff00000000"),
        (MemoryBar(0x1000), 0x18, "00f0ffff00000000"),
        (MemoryBar(0x1000, prefetchable=True), 0x18, "08f0ffff00000000"),
        (MemoryBar(1 << 31), 0x18, "0000008000000000"),
        (MemoryBar(0x4000, is_64bit=True), 0x18, "04c0ffffffffffff"),
        (MemoryBar(1 << 36, is_64bit=True, prefetchable=True), 0x18, "0c000000f0ffffff"),
    ],
)
def test_bar_sizing(bar: MemoryBar, offset: int, sized: str) -> None:
    config = ConfigSpace(IDENTITY, {2: bar})
    flags = config.read(offset, 8)
    config.write(offset, b"\xff" * 4)
    config.write(offset + 4, b"\xff" * 4)
    assert config.read(offset, 8).hex() == sized
    assert config.read(BASE_ADDRESS, 8) == bytes(8)
    config.write(offset, bytes(8))
    assert config.read(offset, 8) == flags
    assert int.from_bytes(flags, "little") == bytes.fromhex(sized)[0] & 0xF


def test_the_rom_and_absent_bars_read_as_zero() -> None:
    config = ConfigSpace(IDENTITY, {0: MemoryBar(0x1000)})
    config.write(BASE_ADDRESS, b"\xff" * 0x24)
    assert config.read(BASE_ADDRESS + 4, 20) == bytes(20)
    config.write(0x30, bytes.fromhex("00f8ffff"))
    assert config.read(0x30, 4) == bytes(4)


@pytest.mark.parametrize(
    "bars",
    [
        {0: MemoryBar(0)},
        {0: MemoryBar(8)},
        {0: MemoryBar(0x1800)},
        {0: MemoryBar(1 << 32)},
        {0: MemoryBar(1 << 64, is_64bit=True)},
        {6: MemoryBar(0x1000)},
        {-1: MemoryBar(0x1000)},
        {5: MemoryBar(0x1000, is_64bit=True)},
        {0: MemoryBar(0x1000, is_64bit=True), 1: MemoryBar(0x1000)},
    ],
)
def test_impossible_bars_are_refused(bars: dict[int, MemoryBar]) -> None:
    with pytest.raises(ValueError, match=r"BAR|overlaps"):
        ConfigSpace(IDENTITY, bars)


def test_command_has_its_bits_and_no_others() -> None:
    config = bare()
    assert config.write(COMMAND, b"\xff\xff") is ConfigEvents.COMMAND_CHANGED
    assert config.command == 0x0546
    assert config.command & Command.MASTER
    assert config.write(COMMAND, b"\xff\xff") is ConfigEvents.NONE
    assert config.write(COMMAND + 1, b"\x00") is ConfigEvents.COMMAND_CHANGED
    assert config.command == Command.MEMORY | Command.MASTER | Command.PARITY


def test_the_device_shows_its_interrupt_in_status() -> None:
    config = bare()
    config.set_interrupt_status(True)
    assert config.read(STATUS, 2) == b"\x08\x00"
    config.write(STATUS, b"\xff\xff")
    assert config.read(STATUS, 2) == b"\x08\x00"
    config.set_interrupt_status(False)
    assert config.read(STATUS, 2) == b"\x00\x00"


def test_interrupt_line_is_the_guests() -> None:
    config = bare()
    assert config.write(INTERRUPT_LINE, b"\x0b\x07") is ConfigEvents.NONE
    assert config.read(INTERRUPT_LINE, 2) == b"\x0b\x01"
    config.reset()
    assert config.read(INTERRUPT_LINE, 2) == b"\x00\x01"


@pytest.mark.parametrize(("offset", "count"), [(CONFIG_SIZE, 1), (CONFIG_SIZE - 1, 2), (-1, 1)])
def test_accesses_outside_are_refused(offset: int, count: int) -> None:
    config = function()
    with pytest.raises(ClientError) as caught:
        config.read(offset, count)
    assert caught.value.errno == errno.EINVAL
    with pytest.raises(ClientError):
        config.write(offset, bytes(count))


def test_capabilities_that_do_not_fit_are_refused() -> None:
    config = bare()
    config.add_capability(0x09, bytes(0xC0 - 2))
    with pytest.raises(ValueError, match="no room"):
        config.add_capability(0x09, bytes(2))
    config.add_extended_capability(0x0B, 1, bytes(0xF00 - 4))
    with pytest.raises(ValueError, match="no room"):
        config.add_extended_capability(0x0B, 1, b"")


@pytest.mark.parametrize("masks", [(bytes(3), None), (None, bytes(5)), (bytes(4), b"")])
def test_masks_must_fit_the_body(masks: tuple[bytes | None, bytes | None]) -> None:
    with pytest.raises(ValueError, match="length"):
        bare().add_capability(0x09, bytes(4), *masks)


class RecordingTrap:
    """A trapped range that answers with its own bytes and notes what is written."""

    def __init__(self, contents: bytes) -> None:
        self.contents = contents
        self.writes: list[tuple[int, bytes, bytes]] = []
        self.config: ConfigSpace | None = None

    def read(self, offset: int, count: int) -> bytes:
        return self.contents[offset : offset + count]

    def write(self, offset: int, data: bytes) -> None:
        window = self.config.read(0x40, 4) if self.config else b""
        self.writes.append((offset, data, window))


def test_traps_answer_for_their_range_alone() -> None:
    config = bare()
    offset = config.add_capability(0x09, bytes(14), b"\xff" * 14)
    second, first = RecordingTrap(b"WXYZ"), RecordingTrap(b"abcd")
    config.trap(offset + 12, 4, second)
    config.trap(offset + 4, 4, first)
    config.write(offset + 8, b"1234")
    assert not first.writes + second.writes
    assert config.read(offset, 16) == b"\x09\x00\x00\x00abcd1234WXYZ"
    assert config.read(offset + 5, 2) == b"bc"
    assert config.read(offset + 7, 2) == b"d1"
    assert config.read(offset + 11, 2) == b"4W"
    assert config.read(0, CONFIG_SIZE)[0x40:0x50] == b"\x09\x00\x00\x00abcd1234WXYZ"


def test_a_straddling_write_reaches_registers_before_traps() -> None:
    config = bare()
    config.add_capability(0x09, bytes(10), b"\xff" * 10)
    trap = RecordingTrap(b"abcd")
    trap.config = config
    config.trap(0x46, 4, trap)
    assert config.write(0x42, memoryview(b"12345678")) is ConfigEvents.NONE
    config.write(0x49, b"!?")
    assert trap.writes == [
        (0, b"5678", b"\x09\x0012"),
        (3, b"!", b"\x09\x0012"),
    ]
    assert config.read(0x4A, 1) == b"?"


def test_a_watch_sees_its_register_whole_and_may_correct_it() -> None:
    config = bare()
    config.add_capability(0x09, bytes(6), b"\xff" * 6)
    seen: list[tuple[int, int, int]] = []

    def watch(before: int, after: int, ones: int) -> tuple[int, ConfigEvents]:
        seen.append((before, after, ones))
        return after & 0x7FFF, ConfigEvents.MSIX_CHANGED

    config.watch(0x44, 2, watch)
    assert config.write(0x44, b"\x34\x12") is ConfigEvents.MSIX_CHANGED
    assert config.write(0x45, b"\xff\xff") is ConfigEvents.MSIX_CHANGED
    assert config.write(0x43, b"\xff\xff") is ConfigEvents.MSIX_CHANGED
    assert config.write(0x46, b"\x55") is ConfigEvents.NONE
    assert config.write(0x42, b"\x66\x77") is ConfigEvents.NONE
    assert seen == [(0, 0x1234, 0x1234), (0x1234, 0xFF34, 0xFF00), (0x7F34, 0x7FFF, 0x00FF)]
    assert config.read(0x42, 6) == bytes.fromhex("6677ff7f5500")


def test_one_write_can_give_rise_to_many_events() -> None:
    config = function()
    assert config.write(0, b"\xff" * CONFIG_SIZE) == (
        ConfigEvents.COMMAND_CHANGED
        | ConfigEvents.FUNCTION_LEVEL_RESET
        | ConfigEvents.POWER_D3
        | ConfigEvents.MSIX_CHANGED
    )


writes = st.integers(0, CONFIG_SIZE).flatmap(
    lambda offset: st.tuples(st.just(offset), st.binary(max_size=min(300, CONFIG_SIZE - offset)))
) | st.tuples(st.integers(0, 0xB0), st.binary(min_size=1, max_size=8))


@given(st.lists(writes, max_size=12))
def test_no_write_changes_what_is_read_only_or_breaks_a_chain(
    sequence: list[tuple[int, bytes]],
) -> None:
    fresh, config = function(), function()
    default = config.read(0, CONFIG_SIZE)
    fresh.write(0, b"\xff" * CONFIG_SIZE)
    can_be_one = int.from_bytes(fresh.read(0, CONFIG_SIZE), "little")
    zeroed = function()
    zeroed.write(0, bytes(CONFIG_SIZE))
    cannot_be_zero = int.from_bytes(zeroed.read(0, CONFIG_SIZE), "little")
    for offset, data in sequence:
        config.write(offset, data)
        value = int.from_bytes(config.read(0, CONFIG_SIZE), "little")
        assert value & ~can_be_one == 0
        assert cannot_be_zero & ~value == 0
    assert [offset for offset, _ in capabilities(config)] == [0x40, 0x7C, 0x84, 0x90]
    assert [offset for offset, _, _ in extended_capabilities(config)] == [0x100, 0x10C]
    copy = function()
    copy.restore_untrusted(config.state())
    assert copy.read(0, CONFIG_SIZE) == config.read(0, CONFIG_SIZE)
    config.reset()
    assert config.read(0, CONFIG_SIZE) == default


@given(st.binary(max_size=16), st.integers(0, CONFIG_SIZE - 1), st.integers(1, 255))
def test_a_foreign_state_is_refused_or_taken_whole(data: bytes, offset: int, flip: int) -> None:
    config = function()
    before = config.state()
    with pytest.raises(ClientError):
        config.restore_untrusted(data)
    state = bytearray(before)
    state[offset] ^= flip
    try:
        config.restore_untrusted(bytes(state))
    except ClientError as error:
        assert error.errno == errno.EINVAL  # noqa: PT017
        assert config.state() == before
    else:
        assert config.state() == state
    assert [where for where, _ in capabilities(config)] == [0x40, 0x7C, 0x84, 0x90]


def test_a_state_with_a_value_that_a_register_cannot_hold_is_refused() -> None:
    config = function()
    config.write(COMMAND, b"\x06\x00")
    before = config.state()
    state = bytearray(before)
    state[0x80] = 1
    with pytest.raises(ClientError, match="0x80") as caught:
        config.restore_untrusted(bytes(state))
    assert caught.value.errno == errno.EINVAL
    assert config.state() == before
