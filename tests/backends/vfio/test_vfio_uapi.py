"""The layouts of linux/vfio.h, byte by byte, as a little-endian machine has them."""

from __future__ import annotations

import struct
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfio_user_virtio.backends.vfio import type1_uapi, uapi
from vfio_user_virtio.device import (
    DmaAccess,
    FeatureOperation,
    IrqAction,
    IrqFlags,
    RegionFlags,
    SparseArea,
)
from vfio_user_virtio.errors import HostError

pytestmark = pytest.mark.skipif(sys.byteorder != "little", reason="the bytes are little-endian")


def hexed(text: str) -> bytearray:
    return bytearray.fromhex(text)


def test_numbers_are_those_of_the_kernel() -> None:
    """_IO(';', 100 + n)."""
    numbers = {
        **uapi.GroupIoctl.__members__,
        **uapi.DeviceIoctl.__members__,
    }
    assert {name: number - 0x3B64 for name, number in numbers.items()} == {
        "GET_STATUS": 3,
        "SET_CONTAINER": 4,
        "UNSET_CONTAINER": 5,
        "GET_DEVICE_FD": 6,
        "GET_INFO": 7,
        "GET_REGION_INFO": 8,
        "GET_IRQ_INFO": 9,
        "SET_IRQS": 10,
        "RESET": 11,
        "IOEVENTFD": 16,
        "FEATURE": 17,
        "BIND_IOMMUFD": 18,
        "ATTACH_IOMMUFD_PT": 19,
        "DETACH_IOMMUFD_PT": 20,
    }
    container = type1_uapi.ContainerIoctl
    assert {name: number - 0x3B64 for name, number in container.__members__.items()} == {
        "GET_API_VERSION": 0,
        "CHECK_EXTENSION": 1,
        "SET_IOMMU": 2,
        "IOMMU_GET_INFO": 12,
        "IOMMU_MAP_DMA": 13,
        "IOMMU_UNMAP_DMA": 14,
    }


# --- device, interrupts, features, groups -------------------------------------------------------


def test_device_info() -> None:
    assert uapi.encode_device_info() == hexed("18000000" + "00" * 20)
    answer = hexed("18000000 03000000 09000000 05000000 00000000 00000000")
    info = uapi.decode_device_info(answer)
    assert (info.num_regions, info.num_irqs) == (9, 5)
    assert info.flags == uapi.KernelDeviceFlags.RESET | uapi.KernelDeviceFlags.PCI


def test_irq_info() -> None:
    assert uapi.encode_irq_info(2) == hexed("10000000 00000000 02000000 00000000")
    irq = uapi.decode_irq_info(hexed("10000000 09000000 02000000 03000000"))
    assert irq == uapi.KernelIrq(3, IrqFlags.EVENTFD | IrqFlags.NORESIZE)


def test_irq_set_with_eventfds() -> None:
    request = uapi.encode_irq_set(2, 1, 2, IrqAction.TRIGGER, eventfds=[7, -1])
    assert request == hexed("1c000000 24000000 02000000 01000000 02000000 07000000 ffffffff")


def test_irq_set_with_bools() -> None:
    request = uapi.encode_irq_set(0, 0, 2, IrqAction.MASK, bools=[True, False])
    assert request == hexed("16000000 0a000000 00000000 00000000 02000000 01 00")


def test_irq_set_that_disables() -> None:
    request = uapi.encode_irq_set(2, 0, 0, IrqAction.TRIGGER)
    assert request == hexed("14000000 21000000 02000000 00000000 00000000")


def test_irq_set_unmasks() -> None:
    request = uapi.encode_irq_set(0, 0, 1, IrqAction.UNMASK)
    assert request == hexed("14000000 11000000 00000000 00000000 01000000")


def test_feature() -> None:
    token = bytes(range(16))
    request = uapi.encode_feature(uapi.KernelFeature.VF_TOKEN, FeatureOperation.SET, token)
    assert request == hexed("18000000 00000200") + token
    assert uapi.feature_data(request) == token


def test_group_status() -> None:
    assert uapi.encode_group_status() == hexed("08000000 00000000")
    flags = uapi.decode_group_status(hexed("08000000 01000000"))
    assert flags == uapi.GroupFlags.VIABLE


def test_container_and_device_name() -> None:
    assert uapi.encode_container(9) == hexed("09000000")
    assert uapi.encode_device_name("0000:01:00.1", None) == b"0000:01:00.1\0"
    token = "00112233-4455-6677-8899-aabbccddeeff"
    name = uapi.encode_device_name("0000:01:00.1", token)
    assert name == b"0000:01:00.1 vf_token=00112233-4455-6677-8899-aabbccddeeff\0"


# --- regions ------------------------------------------------------------------------------------

PLAIN = "20000000 03000000 07000000 00000000 0010000000000000 0000000000070000"


def test_region_info() -> None:
    assert uapi.encode_region_info(4) == hexed("20000000 00000000 04000000" + "00" * 20)
    region = uapi.decode_region_info(hexed(PLAIN))
    assert region.size == 0x1000
    assert region.offset == 7 << 40
    assert region.flags == RegionFlags.READ | RegionFlags.WRITE
    assert region.areas is None
    assert not region.msix_mappable


def test_region_info_with_capabilities() -> None:
    answer = (
        hexed("48000000 0f000000 01000000 20000000 0040000000000000 0000000000010000")
        + hexed("0100 0100 40000000 01000000 00000000")
        + struct.pack("<QQ", 0x1000, 0x3000)
        + hexed("0300 0100 00000000")
    )
    region = uapi.decode_region_info(answer)
    assert region.flags == RegionFlags.READ | RegionFlags.WRITE | RegionFlags.MMAP
    assert region.areas == (SparseArea(0x1000, 0x3000),)
    assert region.msix_mappable


def test_sparse_areas() -> None:
    answer = (
        hexed("50000000 0f000000 01000000 20000000 0040000000000000 0000000000010000")
        + hexed("0100 0100 00000000 02000000 00000000")
        + struct.pack("<QQQQ", 0, 0x1000, 0x2000, 0x2000)
    )
    region = uapi.decode_region_info(answer)
    assert region.areas == (SparseArea(0, 0x1000), SparseArea(0x2000, 0x2000))


def test_more_room_is_asked_for() -> None:
    answer = uapi.encode_region_info(1)
    struct.pack_into("<I", answer, 0, 64)
    assert uapi.needed_size(answer) == 64
    assert uapi.encode_region_info(1, 64)[:4] == b"\x40\0\0\0"
    struct.pack_into("<I", answer, 0, uapi.MAX_INFO_SIZE + 1)
    with pytest.raises(HostError, match="cannot be understood"):
        uapi.needed_size(answer)


@pytest.mark.parametrize(
    "capabilities",
    [
        pytest.param("1f000000", id="inside the fixed part"),
        pytest.param("3a000000", id="cut off"),
        pytest.param("ffffffff", id="far away"),
    ],
)
def test_capability_outside_of_the_answer(capabilities: str) -> None:
    head = f"40000000 08000000 01000000 {capabilities} 0010000000000000 0000000000000000"
    with pytest.raises(HostError, match="a capability at"):
        uapi.decode_region_info(hexed(head) + bytes(32))


def test_capabilities_that_loop() -> None:
    head = hexed("40000000 08000000 01000000 20000000 0010000000000000 0000000000000000")
    with pytest.raises(HostError, match="a capability at 32"):
        uapi.decode_region_info(head + hexed("6300 0100 20000000") + bytes(24))


@pytest.mark.parametrize("areas", [3, 0xFFFF_FFFF])
def test_more_areas_than_there_is_room_for(areas: int) -> None:
    head = hexed("40000000 08000000 01000000 20000000 0010000000000000 0000000000000000")
    sparse = struct.pack("<HHIII", 1, 1, 0, areas, 0) + bytes(32)
    with pytest.raises(HostError, match="sparse areas"):
        uapi.decode_region_info(head + bytearray(sparse))


def test_sparse_capability_that_is_cut_off() -> None:
    head = hexed("28000000 08000000 01000000 20000000 0010000000000000 0000000000000000")
    with pytest.raises(HostError, match="cut off"):
        uapi.decode_region_info(head + hexed("0100 0100 00000000"))


@given(st.binary(min_size=32, max_size=160))
def test_any_region_info_is_decoded_or_refused(answer: bytes) -> None:
    try:
        region = uapi.decode_region_info(bytearray(answer))
    except HostError:
        return
    assert region.areas is None or len(region.areas) <= 8


# --- containers ---------------------------------------------------------------------------------


def test_map() -> None:
    access = DmaAccess.READ | DmaAccess.WRITE
    request = type1_uapi.encode_map(0x100000, 0x2000, access, 0x7F00_0000_1000)
    assert request == hexed("20000000 03000000 00100000007f0000 0000100000000000 0020000000000000")


def test_unmap() -> None:
    request = type1_uapi.encode_unmap(0x100000, 0x2000)
    assert request == hexed("18000000 00000000 0000100000000000 0020000000000000")
    assert type1_uapi.decode_unmapped(request) == 0x2000
    assert type1_uapi.encode_unmap_all() == hexed("18000000 02000000" + "00" * 16)


def test_iommu_info() -> None:
    assert type1_uapi.encode_iommu_info() == hexed("18000000" + "00" * 20)
    answer = (
        hexed("54000000 03000000 0010204000000000 18000000 00000000")
        + hexed("0100 0100 48000000 02000000 00000000")
        + struct.pack("<QQQQ", 0, 0xFEDF_FFFF, 0xFEF0_0000, 0x7F_FFFF_FFFF)
        + hexed("0300 0100 00000000 feff0000")
    )
    info = type1_uapi.decode_iommu_info(answer)
    assert info.page_sizes == 0x4020_1000
    assert info.ranges == ((0, 0xFEDF_FFFF), (0xFEF0_0000, 0x7F_FFFF_FFFF))
    assert info.mappings_left == 65534


def test_iommu_info_without_capabilities() -> None:
    info = type1_uapi.decode_iommu_info(
        hexed("18000000 01000000 0010000000000000 00000000 00000000")
    )
    assert info == type1_uapi.IommuInfo(0x1000)


def test_iommu_info_with_more_ranges_than_there_is_room_for() -> None:
    answer = (
        hexed("30000000 03000000 0010000000000000 18000000 00000000")
        + hexed("0100 0100 00000000 02000000 00000000")
        + bytes(16)
    )
    with pytest.raises(HostError, match="2 ranges"):
        type1_uapi.decode_iommu_info(answer)


@given(st.binary(min_size=24, max_size=160))
def test_any_iommu_info_is_decoded_or_refused(answer: bytes) -> None:
    try:
        info = type1_uapi.decode_iommu_info(bytearray(answer))
    except HostError:
        return
    assert len(info.ranges) <= 8
