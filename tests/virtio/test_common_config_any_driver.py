"""Whatever a driver writes to the common configuration, the device stays one that virtio knows."""

from __future__ import annotations

import attrs
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tests.virtio.common_config_driver import (
    NEGOTIATED,
    NUM_QUEUES,
    NUM_VECTORS,
    OFFERED,
    RUNNING,
    WRITABLE,
    Driver,
    image,
)
from vfio_user_virtio.virtio.common_config import COMMON_CONFIG_SIZE, NO_VECTOR, Status
from vfio_user_virtio.virtio.features import Feature, refusal_untrusted

fields = st.sampled_from(sorted(WRITABLE))
values = st.one_of(
    st.integers(0, 4),
    st.sampled_from([64, 256, 1024, 0xFFFF, 0xFFFF_FFFF, OFFERED & 0xFFFF_FFFF, OFFERED >> 32]),
    st.integers(0, (1 << 64) - 1),
)


class AnyDriver(RuleBasedStateMachine):
    """Whatever a driver writes, the device stays one that virtio knows."""

    @initialize()
    def start(self) -> None:
        self.driver = Driver()
        self.config = self.driver.config
        self.enabled: dict[int, dict[str, object]] = {}
        self.accepted: int | None = None
        self.generation = 0

    @rule(field=fields, value=values)
    def write_a_field(self, field: tuple[int, int], value: int) -> None:
        offset, width = field
        self._write(offset, (value & (1 << 8 * width) - 1).to_bytes(width, "little"))

    @rule(offset=st.integers(0, 80), data=st.binary(max_size=9))
    def write_anything(self, offset: int, data: bytes) -> None:
        self._write(offset, data)

    @rule(word=st.sampled_from([OFFERED, Feature.VERSION_1.mask, OFFERED & ~Feature.CSUM.mask]))
    def choose_features(self, word: int) -> None:
        self.driver.set_features(word)

    @rule(status=st.sampled_from([NEGOTIATED, RUNNING]))
    def proceed(self, status: int) -> None:
        self._write(20, bytes([status]))

    @rule(index=st.integers(0, NUM_QUEUES))
    def enable(self, index: int) -> None:
        self._write(22, index.to_bytes(2, "little"))
        self._write(28, b"\1\0")

    @rule()
    def change_configuration(self) -> None:
        self.config.config_changed()
        self.generation = (self.generation + 1) % 256

    @rule()
    def break_down(self) -> None:
        self.config.needs_reset()

    @rule()
    def reset(self) -> None:
        self._write(20, b"\0")
        fresh = Driver()
        fresh.config.state.config_generation = self.generation
        assert image(self.driver) == image(fresh)
        assert attrs.asdict(self.config.state) == attrs.asdict(fresh.config.state)

    def _write(self, offset: int, data: bytes) -> None:
        self.config.write_untrusted(offset, memoryview(data))
        for call, argument in self.driver.recorder.taken():
            match call:
                case "device_reset":
                    self.enabled.clear()
                    self.accepted = None
                case "queue_enabled":
                    assert argument not in self.enabled
                    self.enabled[argument] = self._frozen(argument)
                case "queue_reset":
                    del self.enabled[argument]
                case "features_accepted":
                    assert self.accepted is None
                    assert refusal_untrusted(OFFERED, argument) is None
                    self.accepted = argument
                case _:
                    assert call == "driver_ok"
                    assert self.accepted is not None

    def _frozen(self, index: int) -> dict[str, object]:
        registers = attrs.asdict(self.config.state.queues[index])
        del registers["msix_vector"]
        return registers

    @invariant()
    def status_is_legal(self) -> None:
        status = self.driver.status
        assert status & ~0b1100_1111 == 0
        assert not status & Status.DRIVER_OK or status & Status.FEATURES_OK
        assert bool(status & Status.FEATURES_OK) == (self.accepted is not None)
        assert self.config.features == (self.accepted or 0)
        broken = status & (Status.FAILED | Status.DEVICE_NEEDS_RESET)
        assert self.config.live == (bool(status & Status.DRIVER_OK) and not broken)

    @invariant()
    def enabled_queues_are_frozen(self) -> None:
        queues = self.config.state.queues
        assert {i for i, queue in enumerate(queues) if queue.enabled} == set(self.enabled)
        for index, registers in self.enabled.items():
            assert self._frozen(index) == registers

    @invariant()
    def registers_are_in_range(self) -> None:
        state = self.config.state
        assert state.config_generation == self.generation
        assert state.driver_features >> 128 == 0
        vectors = {queue.msix_vector for queue in state.queues} | {state.config_msix_vector}
        assert vectors <= {*range(NUM_VECTORS), NO_VECTOR}
        for queue in state.queues:
            assert queue.size in {1 << n for n in range(9)}
            assert max(queue.desc, queue.driver, queue.device) < 1 << 64
        assert len(image(self.driver)) == COMMON_CONFIG_SIZE


TestAnyDriver = AnyDriver.TestCase
