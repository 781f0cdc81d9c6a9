"""PMCSR: every pair of states."""

from __future__ import annotations

import pytest

from vfio_user_virtio.pci.config_space import ConfigEvents, ConfigSpace, Identity
from vfio_user_virtio.pci.power_management import PMCSR, PowerManagement, PowerState


@pytest.fixture
def config() -> ConfigSpace:
    return ConfigSpace(Identity(0x1AF4, 0x1041, 0x020000, 1, 0x1AF4, 0x41), {})


def test_layout(config: ConfigSpace) -> None:
    power = PowerManagement(config)
    assert power.offset == 0x40
    assert config.read(0x40, 8).hex() == "0100030000000000"
    config.write(0x40, b"\xff" * 8)
    assert config.read(0x40, 8).hex() == "0100030003000000"
    config.reset()
    assert config.read(0x44, 1) == b"\0"


@pytest.mark.parametrize(
    ("state", "written", "then", "event"),
    [
        (PowerState.D0, 0, PowerState.D0, ConfigEvents.NONE),
        (PowerState.D0, 1, PowerState.D0, ConfigEvents.NONE),
        (PowerState.D0, 2, PowerState.D0, ConfigEvents.NONE),
        (PowerState.D0, 3, PowerState.D3HOT, ConfigEvents.POWER_D3),
        (PowerState.D3HOT, 0, PowerState.D0, ConfigEvents.POWER_D0),
        (PowerState.D3HOT, 1, PowerState.D3HOT, ConfigEvents.NONE),
        (PowerState.D3HOT, 2, PowerState.D3HOT, ConfigEvents.NONE),
        (PowerState.D3HOT, 3, PowerState.D3HOT, ConfigEvents.NONE),
    ],
)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_transitions(
    config: ConfigSpace,
    state: PowerState,
    written: int,
    then: PowerState,
    event: ConfigEvents,
    size: int,
) -> None:
    power = PowerManagement(config)
    register = power.offset + PMCSR
    config.write(register, bytes([state]))
    assert power.state is state
    assert config.write(register, written.to_bytes(size, "little")) is event
    assert power.state is then
