"""The PCI Express capability: what a guest finds, and Function Level Reset."""

from __future__ import annotations

import pytest

from vfio_user_virtio.pci.config_space import ConfigEvents, ConfigSpace, Identity
from vfio_user_virtio.pci.pcie_capability import add_pcie_capability


@pytest.fixture
def config() -> ConfigSpace:
    config = ConfigSpace(Identity(0x1AF4, 0x1041, 0x020000, 1, 0x1AF4, 0x41), {})
    assert add_pcie_capability(config) == 0x40
    return config


def test_layout(config: ConfigSpace) -> None:
    assert config.read(0x40, 60).hex(" ", 4) == (
        "10000200 00800010 10280000 11000000 00001100"
        " 00000000 00000000 00000000 00000000"
        " 00000000 00000000 02000000 01000000"
        " 00000000 00000000"
    )


@pytest.mark.parametrize(
    ("offset", "data"),
    [(0x48, "1080"), (0x49, "a8"), (0x48, "10a8"), (0x47, "1010a80000"), (0x48, "10a80000")],
)
def test_initiate_flr_is_an_event_and_reads_as_zero(
    config: ConfigSpace, offset: int, data: str
) -> None:
    assert config.write(offset, bytes.fromhex(data)) is ConfigEvents.FUNCTION_LEVEL_RESET
    assert not config.read(0x49, 1)[0] & 0x80
    assert config.write(0x48, config.read(0x48, 2)) is ConfigEvents.NONE


def test_writes_beside_the_bit_are_no_reset(config: ConfigSpace) -> None:
    assert config.write(0x48, b"\xff\x7f") is ConfigEvents.NONE
    assert config.read(0x48, 2) == b"\xff\x78"
    assert config.write(0x48, b"\xff") is ConfigEvents.NONE
    assert config.write(0x4A, b"\xff\xff") is ConfigEvents.NONE
    assert config.read(0x4A, 2) == b"\x00\x00"


def test_nothing_else_but_link_control_is_writable(config: ConfigSpace) -> None:
    config.write(0x40, b"\xff" * 60)
    assert config.read(0x40, 60).hex(" ", 4) == (
        "10000200 00800010 ff780000 11000000 cb001100"
        " 00000000 00000000 00000000 00000000"
        " 00000000 00000000 02000000 01000000"
        " 00000000 00000000"
    )
