"""Register blocks against a model that knows nothing but single bits."""

from __future__ import annotations

import errno
from typing import TypeAlias

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfio_user_virtio.errors import ClientError
from vfio_user_virtio.pci.registers import RegisterBlock

SIZE = 24
Declaration: TypeAlias = "tuple[int, int, int, int, int, int]"


@st.composite
def declarations(draw: st.DrawFn) -> list[Declaration]:
    """(offset, size, default, writable, write-1-to-clear, volatile) of registers in a block."""
    chosen: list[Declaration] = []
    offset = 0
    while True:
        offset += draw(st.integers(0, 3))
        size = draw(st.sampled_from([1, 2, 3, 4, 8]))
        if offset + size > SIZE:
            return chosen
        bits = st.integers(0, (1 << 8 * size) - 1)
        default, writable, clear, volatile = draw(bits), draw(bits), draw(bits), draw(bits)
        clear &= ~writable
        chosen.append((offset, size, default, writable, clear, volatile & ~writable & ~clear))
        offset += size


def build(chosen: list[Declaration]) -> RegisterBlock:
    block = RegisterBlock(SIZE)
    for offset, size, default, writable, clear, volatile in chosen:
        block.declare(
            offset, size, default, writable=writable, write_1_to_clear=clear, volatile=volatile
        )
    return block


def model(chosen: list[Declaration]) -> tuple[dict[int, int], dict[int, str]]:
    """Bit number -> value and bit number -> behaviour, for every bit of the block."""
    values = dict.fromkeys(range(8 * SIZE), 0)
    kinds = dict.fromkeys(range(8 * SIZE), "read-only")
    for offset, size, default, writable, clear, _ in chosen:
        for bit in range(8 * size):
            values[8 * offset + bit] = default >> bit & 1
            if writable >> bit & 1:
                kinds[8 * offset + bit] = "read-write"
            elif clear >> bit & 1:
                kinds[8 * offset + bit] = "clear"
    return values, kinds


def as_bytes(values: dict[int, int]) -> bytes:
    return sum(value << bit for bit, value in values.items()).to_bytes(SIZE, "little")


accesses = st.integers(0, SIZE).flatmap(
    lambda offset: st.tuples(st.just(offset), st.binary(max_size=SIZE - offset))
)


@given(declarations(), st.lists(accesses, max_size=12))
def test_every_bit_does_as_declared(
    chosen: list[Declaration], writes: list[tuple[int, bytes]]
) -> None:
    block = build(chosen)
    values, kinds = model(chosen)
    assert block.read(0, SIZE) == as_bytes(values)
    for offset, data in writes:
        block.write(offset, memoryview(data))
        for position in range(8 * len(data)):
            bit, one = 8 * offset + position, data[position // 8] >> position % 8 & 1
            if kinds[bit] == "read-write":
                values[bit] = one
            elif kinds[bit] == "clear" and one:
                values[bit] = 0
        assert block.read(0, SIZE) == as_bytes(values)
        assert block.read(offset, len(data)) == as_bytes(values)[offset : offset + len(data)]
    block.reset()
    assert block.read(0, SIZE) == as_bytes(model(chosen)[0])


@given(declarations(), st.lists(accesses, max_size=4))
def test_state_travels_to_an_equal_block(
    chosen: list[Declaration], writes: list[tuple[int, bytes]]
) -> None:
    source, target = build(chosen), build(chosen)
    for offset, data in writes:
        source.write(offset, data)
    for offset, size, default, _, _, volatile in chosen:
        source.store(offset, size, source.load(offset, size) ^ volatile)
        assert source.load(offset, size) & volatile == ~default & volatile
    target.restore_untrusted(source.state())
    assert target.read(0, SIZE) == source.read(0, SIZE)


@given(declarations(), st.integers(0, 8 * SIZE - 1))
def test_state_with_another_fixed_bit_is_refused(chosen: list[Declaration], bit: int) -> None:
    block = build(chosen)
    state = bytearray(block.state())
    state[bit // 8] ^= 1 << bit % 8
    mutable = sum(
        (writable | clear | volatile) << 8 * offset
        for offset, _, _, writable, clear, volatile in chosen
    )
    if mutable >> bit & 1:
        block.restore_untrusted(bytes(state))
        assert block.state() == state
    else:
        before = block.state()
        with pytest.raises(ClientError, match="another kind of device") as caught:
            block.restore_untrusted(bytes(state))
        assert caught.value.errno == errno.EINVAL
        assert block.state() == before


@pytest.mark.parametrize("size", [0, SIZE - 1, SIZE + 1])
def test_state_of_another_size_is_refused(size: int) -> None:
    with pytest.raises(ClientError, match="24"):
        RegisterBlock(SIZE).restore_untrusted(bytes(size))


@pytest.mark.parametrize(
    ("offset", "count"), [(-1, 1), (SIZE, 1), (SIZE - 1, 2), (0, SIZE + 1), (2**64, 1), (4, -2)]
)
def test_reads_outside_are_refused(offset: int, count: int) -> None:
    with pytest.raises(ClientError, match="outside") as caught:
        RegisterBlock(SIZE).read(offset, count)
    assert caught.value.errno == errno.EINVAL


@pytest.mark.parametrize(("offset", "count"), [(-1, 1), (SIZE, 1), (SIZE - 1, 2), (2**64, 4)])
def test_writes_outside_are_refused_and_change_nothing(offset: int, count: int) -> None:
    block = RegisterBlock(SIZE)
    block.declare(0, SIZE, writable=(1 << 8 * SIZE) - 1)
    with pytest.raises(ClientError, match="outside"):
        block.write(offset, b"\xff" * count)
    assert block.read(0, SIZE) == bytes(SIZE)


def test_an_empty_access_at_the_end_is_nothing() -> None:
    block = RegisterBlock(SIZE)
    block.write(SIZE, b"")
    assert block.read(SIZE, 0) == b""


@pytest.mark.parametrize(
    ("offset", "size"), [(0, 0), (-1, 1), (SIZE, 1), (SIZE - 1, 2), (4, 1), (3, 2), (7, 4)]
)
def test_registers_that_do_not_fit_are_refused(offset: int, size: int) -> None:
    block = RegisterBlock(SIZE)
    block.declare(4, 4)
    with pytest.raises(ValueError, match=r"outside|overlaps"):
        block.declare(offset, size)


@pytest.mark.parametrize("value", ["value", "writable", "write_1_to_clear", "volatile"])
def test_bits_beyond_the_register_are_refused(value: str) -> None:
    arguments = {value: 0x100}
    with pytest.raises(ValueError, match="beyond"):
        RegisterBlock(SIZE).declare(0, 1, **arguments)


@pytest.mark.parametrize("masks", [(1, 1, 0), (1, 0, 1), (0, 1, 1)])
def test_a_bit_has_one_behaviour(masks: tuple[int, int, int]) -> None:
    writable, clear, volatile = masks
    with pytest.raises(ValueError, match="two behaviours"):
        RegisterBlock(SIZE).declare(
            0, 1, writable=writable, write_1_to_clear=clear, volatile=volatile
        )


def test_a_default_can_change_while_the_device_is_built() -> None:
    block = RegisterBlock(SIZE)
    block.declare(2, 2, 0x1234)
    block.set_default(2, 2, 0xABCD)
    assert block.load(2, 2) == 0xABCD
    block.store(2, 2, 0)
    block.reset()
    assert block.read(0, 6) == bytes.fromhex("0000cdab0000")
