"""virtio's vendor capabilities: virtio 1.4, Virtio Structure PCI Capabilities."""

from __future__ import annotations

import struct

import pytest

from vfio_user_virtio.pci.config_space import ConfigSpace, Identity
from vfio_user_virtio.virtio.pci_capabilities import (
    CfgType,
    Structure,
    add_config_access,
    add_notify_structure,
    add_structure,
)


@pytest.fixture
def config() -> ConfigSpace:
    return ConfigSpace(Identity(0x1AF4, 0x1041, 0x020000, 1, 0x1AF4, 0x1100), {})


class Bars:
    """What the configuration access window reaches: two bytes per address, and a log."""

    def __init__(self) -> None:
        self.log: list[tuple[object, ...]] = []

    def read(self, bar: int, offset: int, count: int) -> bytes:
        self.log.append(("read", bar, offset, count))
        return bytes(range(1, count + 1))

    def write(self, bar: int, offset: int, data: bytes) -> None:
        self.log.append(("write", bar, offset, data))


def test_a_structure_is_16_bytes(config: ConfigSpace) -> None:
    at = add_structure(config, Structure(CfgType.COMMON, 4, 0x1000, 64))
    assert config.read(at, 16) == bytes.fromhex("09 00 10 01 04 00 00 00 00100000 40000000")


def test_notify_has_a_multiplier(config: ConfigSpace) -> None:
    at = add_notify_structure(config, Structure(CfgType.NOTIFY, 4, 0x3000, 0x1000), 4)
    assert config.read(at, 20) == bytes.fromhex(
        "09 00 14 02 04 00 00 00 00300000 00100000 04000000"
    )


def point(config: ConfigSpace, at: int, bar: int, offset: int, length: int) -> None:
    config.write(at + 4, bytes((bar,)))
    config.write(at + 8, struct.pack("<II", offset, length))


@pytest.mark.parametrize("length", [1, 2, 4])
def test_the_window_reads_and_writes_a_bar(config: ConfigSpace, length: int) -> None:
    bars = Bars()
    at = add_config_access(config, bars.read, bars.write)
    assert config.read(at, 4) == bytes.fromhex("09 00 14 05")
    point(config, at, 4, 0x20, length)
    data = config.read(at + 16, 4)
    assert data == bytes(range(1, length + 1)).ljust(4, b"\0")
    config.write(at + 16, b"\xaa\xbb\xcc\xdd"[:length])
    assert bars.log == [
        ("read", 4, 0x20, length),
        ("write", 4, 0x20, b"\xaa\xbb\xcc\xdd"[:length]),
    ]


@pytest.mark.parametrize(
    ("offset", "length"), [(0, 0), (0, 3), (0, 8), (1, 2), (2, 4), (0, 1 << 31)]
)
def test_the_window_is_shut_for_odd_accesses(config: ConfigSpace, offset: int, length: int) -> None:
    bars = Bars()
    at = add_config_access(config, bars.read, bars.write)
    point(config, at, 4, offset, length)
    assert config.read(at + 16, 4) == bytes(4)
    config.write(at + 16, bytes(4))
    assert bars.log == []


def test_a_write_must_bring_all_of_the_access(config: ConfigSpace) -> None:
    bars = Bars()
    at = add_config_access(config, bars.read, bars.write)
    point(config, at, 4, 0, 4)
    config.write(at + 16, bytes(2))
    config.write(at + 18, bytes(2))
    assert bars.log == []
    config.write(at + 16, bytes(4))
    assert bars.log == [("write", 4, 0, bytes(4))]
