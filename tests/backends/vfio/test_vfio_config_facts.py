"""What is read of a configuration space, and that a broken one is refused."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfio_user_virtio.backends.vfio.areas import Hole
from vfio_user_virtio.backends.vfio.config_facts import CONFIG_SIZE, read_config_facts
from vfio_user_virtio.errors import HostError


def config(*capabilities: tuple[int, bytes]) -> bytes:
    """A space with capabilities at 0x40, 0x50, …: number and body."""
    data = bytearray(CONFIG_SIZE)
    data[6] = 0x10
    data[0x34] = 0x40 if capabilities else 0
    for index, (number, body) in enumerate(capabilities):
        position = 0x40 + 16 * index
        following = position + 16 if index + 1 < len(capabilities) else 0
        data[position : position + 2 + len(body)] = bytes((number, following)) + body
    return bytes(data)


def test_msix_table_and_pending_bits() -> None:
    facts = read_config_facts(config((0x11, struct.pack("<HII", 0x8000 | 127, 1, 0x802))), "vf")
    assert facts.holes == (Hole(1, 0, 128 * 16), Hole(2, 0x800, 16))


@pytest.mark.parametrize(
    ("number", "start", "size"),
    [
        pytest.param(0x10, 8, 2, id="PCI Express"),
        pytest.param(0x01, 4, 2, id="Power Management"),
        pytest.param(0x13, 4, 1, id="Advanced Features"),
    ],
)
def test_registers_that_reset(number: int, start: int, size: int) -> None:
    facts = read_config_facts(config((0x09, b""), (number, b"")), "vf")
    first = 0x50 + start
    for offset in range(0x40, 0x60):
        expected = first <= offset < first + size
        assert facts.may_reset(offset, 1) is expected
    assert facts.may_reset(0, 256)


def test_no_capabilities() -> None:
    data = bytearray(config((0x11, bytes(10))))
    data[6] = 0
    assert read_config_facts(bytes(data), "vf").holes == ()


@pytest.mark.parametrize("position", [0x04, 0x40, 0xFC])
def test_a_list_that_leads_nowhere(position: int) -> None:
    data = bytearray(config((0x09, b"")))
    data[0x41] = position
    with pytest.raises(HostError, match=f"vf: its capability list goes to {position:#x}"):
        read_config_facts(bytes(data), "vf")


def test_a_device_that_has_gone() -> None:
    with pytest.raises(HostError, match="has gone"):
        read_config_facts(b"\xff" * CONFIG_SIZE, "vf")


@given(st.binary(min_size=CONFIG_SIZE, max_size=CONFIG_SIZE))
def test_any_space_is_read_or_refused(data: bytes) -> None:
    try:
        facts = read_config_facts(data, "vf")
    except HostError:
        return
    assert all(0 < hole.size <= 2048 * 16 for hole in facts.holes)
