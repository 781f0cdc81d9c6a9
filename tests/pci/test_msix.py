"""MSI-X: the capability, the table as storage, the pending bits."""

from __future__ import annotations

import errno

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfio_user_virtio.errors import ClientError
from vfio_user_virtio.pci.config_space import ConfigEvents, ConfigSpace, Identity
from vfio_user_virtio.pci.msix import (
    MAX_VECTORS,
    MESSAGE_CONTROL,
    MsixCapability,
    PendingBits,
    msix_table,
)


@pytest.fixture
def config() -> ConfigSpace:
    return ConfigSpace(Identity(0x1AF4, 0x1041, 0x020000, 1, 0x1AF4, 0x41), {})


def capability(config: ConfigSpace, vectors: int = 17) -> MsixCapability:
    return MsixCapability(
        config, vectors, table_bar=1, table_offset=0x2000, pba_bar=4, pba_offset=0x3008
    )


def test_layout(config: ConfigSpace) -> None:
    msix = capability(config)
    assert msix.offset == 0x40
    assert config.read(0x40, 12).hex(" ", 4) == "11001000 01200000 0c300000"
    config.write(0x40, b"\xff" * 12)
    assert config.read(0x40, 12).hex(" ", 4) == "110010c0 01200000 0c300000"


def test_control_changes_are_events(config: ConfigSpace) -> None:
    msix = capability(config)
    control = msix.offset + MESSAGE_CONTROL
    assert (msix.enabled, msix.function_masked) == (False, False)
    assert config.write(control, b"\x00\xc0") is ConfigEvents.MSIX_CHANGED
    assert (msix.enabled, msix.function_masked) == (True, True)
    assert config.write(control + 1, b"\x80") is ConfigEvents.MSIX_CHANGED
    assert (msix.enabled, msix.function_masked) == (True, False)
    assert config.write(control, b"\xff\x80") is ConfigEvents.NONE
    config.reset()
    assert (msix.enabled, msix.function_masked) == (False, False)


@pytest.mark.parametrize("vectors", [0, -1, MAX_VECTORS + 1])
def test_impossible_numbers_of_vectors_are_refused(config: ConfigSpace, vectors: int) -> None:
    with pytest.raises(ValueError, match="2048"):
        capability(config, vectors)
    with pytest.raises(ValueError, match="2048"):
        msix_table(vectors)
    with pytest.raises(ValueError, match="2048"):
        PendingBits(vectors)


@pytest.mark.parametrize(("table", "pba"), [(4, 0), (0, 1), (0x1002, 0x2000)])
def test_offsets_must_be_aligned(config: ConfigSpace, table: int, pba: int) -> None:
    with pytest.raises(ValueError, match="aligned"):
        MsixCapability(config, 1, table_bar=0, table_offset=table, pba_bar=0, pba_offset=pba)


def test_the_table_is_masked_storage() -> None:
    table = msix_table(3)
    empty = bytes(12) + b"\1\0\0\0"
    assert table.read(0, 48) == 3 * empty
    table.write(16, b"\xff" * 16)
    assert table.read(0, 48) == empty + b"\xfc" + b"\xff" * 11 + b"\1\0\0\0" + empty
    table.write(28, bytes(4))
    assert table.read(28, 4) == bytes(4)
    table.reset()
    assert table.read(0, 48) == 3 * empty


@pytest.mark.parametrize(
    ("vectors", "size"), [(1, 8), (64, 8), (65, 16), (128, 16), (129, 24), (2048, 256)]
)
def test_pending_bits_come_in_64_bit_words(vectors: int, size: int) -> None:
    pending = PendingBits(vectors)
    assert pending.size == size
    assert pending.read(0, size) == bytes(size)
    pending.add(vectors - 1)
    assert pending.read(0, size) == (1 << vectors - 1).to_bytes(size, "little")
    with pytest.raises(ClientError) as caught:
        pending.read(size, 1)
    assert caught.value.errno == errno.EINVAL


@given(st.lists(st.tuples(st.sampled_from(["add", "take"]), st.integers(0, 99))))
def test_pending_bits_are_a_set(steps: list[tuple[str, int]]) -> None:
    pending, model = PendingBits(100), set[int]()
    for step, vector in steps:
        if step == "add":
            pending.add(vector)
            model.add(vector)
        else:
            assert pending.take(vector) is (vector in model)
            model.discard(vector)
        assert pending.read(0, 16) == sum(1 << bit for bit in model).to_bytes(16, "little")
    other = PendingBits(100)
    other.restore_untrusted(pending.state())
    assert other.read(0, 16) == pending.read(0, 16)
    pending.clear()
    assert pending.read(0, 16) == bytes(16)


@pytest.mark.parametrize("state", [b"", bytes(7), b"\x20" + bytes(7), bytes(7) + b"\x80"])
def test_pending_bits_of_absent_vectors_are_refused(state: bytes) -> None:
    pending = PendingBits(5)
    with pytest.raises(ClientError) as caught:
        pending.restore_untrusted(state)
    assert caught.value.errno == errno.EINVAL
    assert pending.read(0, 8) == bytes(8)
