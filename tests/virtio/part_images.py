"""An image of a small virtio-net device, as bytes written down by hand and as parts."""

from __future__ import annotations

from typing import Final

from vfio_user_virtio.virtio.part_header import OPTIONAL, PartType
from vfio_user_virtio.virtio.parts import Part

GOLDEN: Final[list[tuple[str, str, Part]]] = [
    (
        "DEV_FEATURES",
        "0001 01 00 0000000000000000 10000000 2300000001000000 0000000000000000",
        Part(PartType.DEV_FEATURES, bytes.fromhex("23000000010000000000000000000000"), flags=1),
    ),
    (
        "DRV_FEATURES",
        "0101 00 00 0000000000000000 10000000 2300000001000000 0000000000000000",
        Part(PartType.DRV_FEATURES, bytes.fromhex("23000000010000000000000000000000")),
    ),
    (
        "PCI_COMMON_CFG config_msix_vector",
        "0201 00 00 1000000000000000 02000000 0700",
        Part(PartType.PCI_COMMON_CFG, b"\x07\0", bytes.fromhex("1000000000000000")),
    ),
    (
        "PCI_COMMON_CFG config_generation",
        "0201 00 00 1500000000000000 01000000 09",
        Part(PartType.PCI_COMMON_CFG, b"\x09", bytes.fromhex("1500000000000000")),
    ),
    (
        "DEVICE_STATUS",
        "0301 00 00 0000000000000000 01000000 0f",
        Part(PartType.DEVICE_STATUS, b"\x0f"),
    ),
    (
        "VQ_CFG queue 3",
        "0401 00 00 0300000000000000 20000000"
        "0001 0200 0100 0000 0010000000000000 0020000000000000 0030000000000000",
        Part(
            PartType.VQ_CFG,
            bytes.fromhex("0001020001000000001000000000000000200000000000000030000000000000"),
            bytes.fromhex("0300000000000000"),
        ),
    ),
    (
        "VQ_NOTIFY_CFG queue 2",
        "0501 00 00 0200000000000000 08000000 0200 0300 00000000",
        Part(
            PartType.VQ_NOTIFY_CFG,
            bytes.fromhex("0200030000000000"),
            bytes.fromhex("0200000000000000"),
        ),
    ),
    (
        "CVQ_CFG MAC_ADDR_SET",
        "0002 00 00 0101000000000000 06000000 020000000001",
        Part(PartType.CVQ_CFG, b"\x02\0\0\0\0\x01", bytes.fromhex("0101000000000000")),
    ),
    (
        "part 0x201 0500000000000000",
        "0102 01 00 0500000000000000 00000000",
        Part(0x201, b"", bytes.fromhex("0500000000000000"), flags=OPTIONAL),
    ),
]
"""Name, bytes and part of each, in the canonical order."""

IMAGE: Final = bytes.fromhex("".join(raw for _, raw, _ in GOLDEN))
PARTS: Final = [part for _, _, part in GOLDEN]
