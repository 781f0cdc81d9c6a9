"""The layouts of linux/iommufd.h, byte by byte, as a little-endian machine has them."""

from __future__ import annotations

import struct
import sys

import pytest

from vfio_user_virtio.backends.vfio import iommufd_uapi as codec
from vfio_user_virtio.device import DmaAccess

pytestmark = pytest.mark.skipif(sys.byteorder != "little", reason="the bytes are little-endian")


def hexed(text: str) -> bytearray:
    return bytearray.fromhex(text)


def test_numbers_are_those_of_the_kernel() -> None:
    """_IO(';', 0x80 + n)."""
    numbers = codec.IommufdIoctl.__members__
    assert {name: number - 0x3B80 for name, number in numbers.items()} == {
        "DESTROY": 0,
        "IOAS_ALLOC": 1,
        "IOAS_IOVA_RANGES": 4,
        "IOAS_MAP": 5,
        "IOAS_UNMAP": 6,
        "HWPT_ALLOC": 9,
        "GET_HW_INFO": 10,
        "HWPT_SET_DIRTY_TRACKING": 11,
        "HWPT_GET_DIRTY_BITMAP": 12,
        "IOAS_MAP_FILE": 15,
    }


def test_bind_without_token() -> None:
    assert codec.encode_bind(5) == hexed("10000000 00000000 05000000 00000000")
    assert codec.decode_bind(hexed("10000000 00000000 05000000 07000000")) == 7


def test_bind_with_token() -> None:
    request = codec.encode_bind(5, 0x7F00_0000_1000)
    assert request == hexed("18000000 01000000 05000000 00000000 00100000007f0000")


def test_attach_and_destroy() -> None:
    assert codec.encode_attach(3) == hexed("0c000000 00000000 03000000")
    assert codec.encode_destroy(3) == hexed("08000000 03000000")


def test_ioas_alloc() -> None:
    assert codec.encode_ioas_alloc() == hexed("0c000000 00000000 00000000")
    assert codec.decode_ioas_alloc(hexed("0c000000 00000000 02000000")) == 2


def test_iova_ranges() -> None:
    request = codec.encode_iova_ranges(2, 16, 0x7F00_0000_1000)
    assert request == hexed("20000000 02000000 10000000 00000000 00100000007f0000" + "00" * 8)
    answer = hexed("20000000 02000000 03000000 00000000 00100000007f0000 0010000000000000")
    assert codec.decode_iova_ranges(answer) == (3, 0x1000)
    pairs = struct.pack("<QQQQ", 0, 0xFEDF_FFFF, 0xFEF0_0000, codec.MAX_IOVA)
    expected = ((0, 0xFEDF_FFFF), (0xFEF0_0000, codec.MAX_IOVA))
    assert codec.decode_range_list(pairs) == expected


@pytest.mark.parametrize(
    ("access", "flags"),
    [
        (DmaAccess.READ, "05000000"),
        (DmaAccess.WRITE, "03000000"),
        (DmaAccess.READ | DmaAccess.WRITE, "07000000"),
    ],
)
def test_map_at_a_fixed_address(access: DmaAccess, flags: str) -> None:
    request = codec.encode_map(2, 0x100000, 0x2000, access, 0x7F00_0000_1000)
    assert request == hexed(
        f"28000000 {flags} 02000000 0000000000100000007f0000 0020000000000000 0000100000000000"
    )


def test_map_file() -> None:
    request = codec.encode_map_file(2, 0x100000, 0x2000, DmaAccess.READ, 11, 0x3000)
    assert request == hexed(
        "28000000 05000000 02000000 0b000000 0030000000000000 0020000000000000 0000100000000000"
    )


def test_unmap() -> None:
    request = codec.encode_unmap(2, 0x100000, 0x2000)
    assert request == hexed("18000000 02000000 0000100000000000 0020000000000000")
    assert codec.encode_unmap_all(2) == hexed("18000000 02000000 0000000000000000" + "ff" * 8)


def test_page_table_with_dirty_tracking() -> None:
    request = codec.encode_hwpt_alloc(7, 2)
    assert request == hexed("28000000 02000000 07000000 02000000" + "00" * 24)
    struct.pack_into("<I", request, 16, 9)
    assert codec.decode_hwpt_alloc(request) == 9


def test_hardware_info() -> None:
    request = codec.encode_hw_info(7)
    assert request == hexed("28000000 00000000 07000000" + "00" * 28)
    assert not codec.decode_tracks_dirty(request)
    struct.pack_into("<Q", request, 32, 1)
    assert codec.decode_tracks_dirty(request)


def test_dirty_tracking() -> None:
    assert codec.encode_set_dirty_tracking(9, on=True) == hexed(
        "10000000 01000000 09000000 00000000"
    )
    assert codec.encode_set_dirty_tracking(9, on=False) == hexed(
        "10000000 00000000 09000000 00000000"
    )
    request = codec.encode_get_dirty_bitmap(
        9, 0x100000, 0x2000, 0x1000, 0x7F00_0000_1000, clear=False
    )
    assert request == hexed(
        "30000000 09000000 01000000 00000000 0000100000000000 0020000000000000"
        "0010000000000000 00100000007f0000"
    )
    assert codec.encode_get_dirty_bitmap(9, 0, 0x1000, 0x1000, 0, clear=True)[8:12] == bytes(4)
