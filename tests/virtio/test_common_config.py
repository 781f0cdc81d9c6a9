"""The common configuration structure: every offset at every width, and the rules of its status."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

import attrs
import pytest

from tests.virtio.common_config_driver import (
    FEATURES_READ,
    NEGOTIATED,
    NUM_QUEUES,
    NUM_VECTORS,
    OFFERED,
    QUEUE_SIZE,
    RUNNING,
    WRITABLE,
    Driver,
    Recorder,
    image,
)
from vfio_user_virtio.virtio.common_config import NO_VECTOR, CommonConfig, QueueState, Status
from vfio_user_virtio.virtio.features import Feature

if TYPE_CHECKING:
    from collections.abc import Sequence


def populated() -> Driver:
    """A device of which every register differs from its default where it can."""
    driver = Driver()
    driver.write(0, 4, 1)
    driver.set_features(OFFERED)
    driver.write(8, 4, 1)
    driver.write(16, 2, 3)
    driver.status = NEGOTIATED
    driver.config.config_changed()
    driver.write(22, 2, 2)
    driver.write(24, 2, 64)
    driver.write(26, 2, 1)
    driver.write(32, 8, 0x1122_3344_5566_7788)
    driver.write(40, 8, 0x99AA_BBCC_DDEE_FF00)
    driver.write(48, 8, 0x0102_0304_0506_0708)
    driver.recorder.taken()
    return driver


POPULATED: Final = struct.pack(
    "<IIIIHHBBHHHHHQQQHHHH",
    1,
    OFFERED >> 32 & 0xFFFF_FFFF,
    1,
    OFFERED >> 32 & 0xFFFF_FFFF,
    3,
    NUM_QUEUES,
    NEGOTIATED,
    1,
    2,
    64,
    1,
    0,
    2,
    0x1122_3344_5566_7788,
    0x99AA_BBCC_DDEE_FF00,
    0x0102_0304_0506_0708,
    0,
    0,
    0,
    0,
)
ACCESSES: Final = [(offset, width) for offset in range(72) for width in (1, 2, 3, 4, 8, 16)]


# --- reads and writes, exhaustively --------------------------------------------------------------


def test_every_read_is_a_piece_of_the_structure_and_zero_beyond_it() -> None:
    driver = populated()
    assert image(driver) == POPULATED
    padded = POPULATED + bytes(128)
    for offset, width in ACCESSES:
        assert driver.config.read(offset, width) == padded[offset : offset + width]
    assert driver.config.read(1 << 40, 4) == bytes(4)
    assert driver.recorder.taken() == []


@pytest.mark.parametrize("value", [0, 1, 2, (1 << 128) - 1])
def test_a_write_that_is_not_one_field_or_half_is_ignored(value: int) -> None:
    for offset, width in ACCESSES:
        if (offset, width) in WRITABLE:
            continue
        driver = populated()
        before = attrs.asdict(driver.config.state)
        driver.write(offset, width, value & (1 << 8 * width) - 1)
        assert attrs.asdict(driver.config.state) == before, (offset, width)
        assert driver.recorder.taken() == []
    populated().config.write_untrusted(20, b"")


@pytest.mark.parametrize(
    ("offset", "width", "value", "reads"),
    [
        (0, 4, 0xFFFF_FFFF, 0xFFFF_FFFF),
        (8, 4, 0xFFFF_FFFF, 0xFFFF_FFFF),
        (12, 4, 0xFFFF_FFFF, 0xFFFF_FFFF),
        (16, 2, NUM_VECTORS - 1, NUM_VECTORS - 1),
        (16, 2, NUM_VECTORS, NO_VECTOR),
        (16, 2, NO_VECTOR, NO_VECTOR),
        (20, 1, 0xFF & ~Status.FEATURES_OK, Status.ACKNOWLEDGE | Status.DRIVER | Status.FAILED),
        (22, 2, NUM_QUEUES - 1, NUM_QUEUES - 1),
        (22, 2, 0xFFFF, 0xFFFF),
        (24, 2, 128, 128),
        (24, 2, 1, 1),
        (24, 2, 0, QUEUE_SIZE),
        (24, 2, 3, QUEUE_SIZE),
        (24, 2, 2 * QUEUE_SIZE, QUEUE_SIZE),
        (24, 2, 0x8000, QUEUE_SIZE),
        (26, 2, 0, 0),
        (26, 2, NUM_VECTORS, NO_VECTOR),
        (28, 2, 1, 1),
        (28, 2, 0, 0),
        (28, 2, 2, 0),
        (32, 8, 0x0123_4567_89AB_CDEF, 0x0123_4567_89AB_CDEF),
        (40, 8, (1 << 64) - 1, (1 << 64) - 1),
        (48, 8, 0x0123_4567_89AB_CDEF, 0x0123_4567_89AB_CDEF),
        (58, 2, 1, 0),
    ],
)
def test_what_each_register_takes_in_a_fresh_device(
    offset: int, width: int, value: int, reads: int
) -> None:
    driver = Driver()
    driver.write(offset, width, value)
    assert driver.read(offset, width) == reads


@pytest.mark.parametrize("offset", [32, 40, 48])
@pytest.mark.parametrize("order", [(0, 4), (4, 0)])
def test_a_64_bit_register_takes_halves_in_either_order(offset: int, order: Sequence[int]) -> None:
    driver = Driver()
    driver.write(offset, 8, (1 << 64) - 1)
    halves = {0: 0x89AB_CDEF, 4: 0x0123_4567}
    for half in order:
        driver.write(offset + half, 4, halves[half])
        assert driver.read(offset + half, 4) == halves[half]
    assert driver.read(offset, 8) == 0x0123_4567_89AB_CDEF
    others = {32, 40, 48} - {offset}
    assert [driver.read(other, 8) for other in others] == [0, 0]


def test_defaults() -> None:
    driver = Driver()
    for index in range(NUM_QUEUES):
        driver.write(22, 2, index)
        assert image(driver) == struct.pack(
            "<IIIIHHBBHHHHHQQQHHHH",
            *(0, OFFERED & 0xFFFF_FFFF, 0, 0, NO_VECTOR, NUM_QUEUES, 0, 0),
            *(index, QUEUE_SIZE, NO_VECTOR, 0, index, 0, 0, 0, 0, 0, 0, 0),
        )


def test_a_queue_that_is_not_there_has_size_0_and_takes_nothing() -> None:
    driver = Driver()
    driver.negotiate()
    driver.recorder.taken()
    for index in (NUM_QUEUES, 0xFFFF):
        driver.write(22, 2, index)
        for offset, width in ((24, 2), (26, 2), (28, 2), (32, 8), (40, 8), (48, 8), (58, 2)):
            driver.write(offset, width, 1)
        assert driver.config.read(24, 34) == b"\0\0\xff\xff" + bytes(30)
    assert driver.recorder.taken() == []
    assert driver.config.state.queues == [QueueState(QUEUE_SIZE)] * NUM_QUEUES


# --- features ------------------------------------------------------------------------------------


def test_offered_features_are_read_by_word_and_are_0_beyond_128_bits() -> None:
    driver = Driver()
    words = []
    for select in (0, 1, 2, 3, 4, 0xFFFF_FFFF):
        driver.write(0, 4, select)
        words.append(driver.read(4, 4))
    assert words == [OFFERED & 0xFFFF_FFFF, OFFERED >> 32 & 0xFFFF_FFFF, 1 << 6, 0, 0, 0]


def test_driver_features_are_written_by_word_and_nowhere_beyond_128_bits() -> None:
    driver = Driver()
    for select in range(6):
        driver.write(8, 4, select)
        driver.write(12, 4, 0xA000_0000 + select)
        assert driver.read(12, 4) == (0xA000_0000 + select if select < 4 else 0)
    assert driver.config.state.driver_features == sum(
        0xA000_0000 + select << 32 * select for select in range(4)
    )
    driver.write(8, 4, 1)
    driver.write(12, 4, 5)
    assert driver.config.state.driver_features >> 32 & 0xFFFF_FFFF == 5


def test_negotiation() -> None:
    driver = Driver()
    driver.negotiate()
    assert driver.status == NEGOTIATED
    assert driver.config.features == OFFERED
    assert driver.config.refusal is None
    assert driver.recorder.taken() == [("features_accepted", OFFERED)]
    driver.status = NEGOTIATED
    assert driver.recorder.taken() == []


def test_features_that_may_not_be_are_refused_until_they_are_mended() -> None:
    driver = Driver()
    driver.negotiate(OFFERED & ~Feature.CSUM.mask)
    assert driver.status == FEATURES_READ
    assert driver.config.features == 0
    assert driver.config.refusal == "HOST_TSO4 without CSUM"
    assert driver.recorder.taken() == []
    driver.negotiate()
    assert driver.status == NEGOTIATED
    assert driver.config.refusal is None


def test_features_are_frozen_from_features_ok_to_reset() -> None:
    driver = Driver()
    driver.negotiate()
    driver.set_features(Feature.VERSION_1.mask)
    assert driver.config.features == OFFERED
    driver.status = 0
    assert driver.config.features == 0
    driver.negotiate(Feature.VERSION_1.mask)
    assert driver.config.features == Feature.VERSION_1.mask


# --- status --------------------------------------------------------------------------------------


def test_driver_ok_needs_features_ok() -> None:
    driver = Driver()
    driver.status = FEATURES_READ | Status.DRIVER_OK
    assert (driver.status, driver.config.live) == (FEATURES_READ, False)
    driver.negotiate()
    driver.recorder.taken()
    driver.status = RUNNING
    assert (driver.status, driver.config.live) == (RUNNING, True)
    driver.status = RUNNING
    assert driver.recorder.taken() == [("driver_ok", 0)]


def test_driver_ok_may_come_with_features_ok_but_not_with_its_refusal() -> None:
    driver = Driver()
    driver.status = RUNNING
    assert driver.status == FEATURES_READ
    driver.set_features(OFFERED)
    driver.status = RUNNING
    assert driver.status == RUNNING
    assert driver.recorder.taken() == [("features_accepted", OFFERED), ("driver_ok", 0)]


def test_bits_of_the_status_go_only_by_reset_and_some_are_not_the_drivers() -> None:
    driver = Driver()
    driver.run()
    driver.status = Status.ACKNOWLEDGE
    assert driver.status == RUNNING
    driver.status = 0xFF
    assert driver.status == RUNNING | Status.FAILED
    assert not driver.config.live
    assert driver.recorder.taken() == []


def test_needs_reset_stops_the_queues_until_the_reset() -> None:
    driver = Driver()
    driver.run()
    driver.config.needs_reset()
    assert driver.status == RUNNING | Status.DEVICE_NEEDS_RESET
    assert not driver.config.live
    driver.status = RUNNING
    assert driver.status == RUNNING | Status.DEVICE_NEEDS_RESET
    driver.status = 0
    assert driver.status == 0


def test_reset_gives_the_defaults_and_keeps_counting_generations() -> None:
    driver = populated()
    driver.enable_queue(0)
    driver.recorder.taken()
    driver.status = 0
    assert driver.recorder.taken() == [("device_reset", 0)]
    fresh = Driver()
    fresh.config.config_changed()
    assert image(driver) == image(fresh)
    assert attrs.asdict(driver.config.state) == attrs.asdict(fresh.config.state)
    driver.status = 0
    assert driver.recorder.taken() == [("device_reset", 0)]


def test_generations_wrap() -> None:
    driver = Driver()
    seen = set()
    for _ in range(256):
        driver.config.config_changed()
        seen.add(driver.read(21, 1))
    assert len(seen) == 256
    assert driver.read(21, 1) == 0


# --- queues --------------------------------------------------------------------------------------

FROZEN: Final = [(24, 2, 8), (28, 2, 0), (28, 2, 1), (32, 8, 1), (40, 8, 1), (48, 8, 1)] + [
    (offset, 4, 1) for offset in (32, 36, 40, 44, 48, 52)
]


def test_queues_are_enabled_each_for_itself_and_once() -> None:
    driver = Driver()
    driver.enable_queue(2)
    driver.enable_queue(0)
    driver.enable_queue(0)
    assert driver.recorder.taken() == [("queue_enabled", 2), ("queue_enabled", 0)]
    assert [queue.enabled for queue in driver.config.state.queues] == [True, False, True]


def test_an_enabled_queue_is_frozen_but_for_its_vector() -> None:
    driver = populated()
    driver.enable_queue(2)
    driver.recorder.taken()
    before = attrs.asdict(driver.config.state.queues[2])
    for offset, width, value in FROZEN:
        driver.write(offset, width, value)
        assert attrs.asdict(driver.config.state.queues[2]) == before
    driver.write(26, 2, 2)
    assert attrs.asdict(driver.config.state.queues[2]) == before | {"msix_vector": 2}
    assert driver.recorder.taken() == []


def test_a_queue_is_reset_alone() -> None:
    driver = populated()
    driver.enable_queue(1)
    driver.enable_queue(2)
    driver.recorder.taken()
    driver.write(58, 2, 0)
    driver.write(58, 2, 2)
    assert driver.config.state.queues[2].enabled
    driver.write(58, 2, 1)
    assert driver.read(58, 2) == 0
    assert driver.config.state.queues[2] == QueueState(QUEUE_SIZE)
    assert driver.config.state.queues[1].enabled
    assert driver.recorder.taken() == [("queue_reset", 2)]
    driver.enable_queue(2)
    assert driver.recorder.taken() == [("queue_enabled", 2)]


def test_reset_of_a_queue_that_is_not_enabled_has_no_consequence() -> None:
    driver = populated()
    driver.write(58, 2, 1)
    assert driver.config.state.queues[2] == QueueState(QUEUE_SIZE)
    assert driver.recorder.taken() == []


def test_queue_reset_is_nothing_without_ring_reset() -> None:
    driver = Driver()
    driver.run(OFFERED & ~Feature.RING_RESET.mask)
    driver.enable_queue(1)
    driver.write(58, 2, 1)
    assert driver.config.state.queues[1].enabled
    assert driver.recorder.taken() == [("queue_enabled", 1)]


# --- administration virtqueues ------------------------------------------------------------------


def test_administration_virtqueues_are_behind_the_others_and_not_counted() -> None:
    recorder = Recorder()
    config = CommonConfig(
        offered=OFFERED,
        num_queues=3,
        queue_size=16,
        num_vectors=4,
        consequences=recorder,
        admin_queues=2,
    )
    assert config.read(18, 2) == b"\3\0"
    assert config.read(60, 4) == b"\3\0\2\0"
    config.write_untrusted(22, b"\4\0")
    assert config.read(24, 2) == b"\x10\0"
    config.write_untrusted(28, b"\1\0")
    assert recorder.taken() == [("queue_enabled", 4)]
    config.reset()
    assert len(config.state.queues) == 5
