"""The Power Management capability (ID 0x01): D0 and D3hot, and nothing between them.

QEMU reads PMCSR around a reset and forces D0; Linux puts an unused function into D3hot.  With
No_Soft_Reset 0, coming back to D0 resets the function, so a guest that sleeps gets a device as new
as FLR makes it, and QEMU may count on it.  No PME: nothing here could wake a machine.

Version 3 (PCI Bus Power Management 1.2; PCI Express Base 4.0, 7.5.2), 8 bytes with the header:
Capabilities (PMC) 16, Control/Status (PMCSR) 16, bridge extensions 8, data 8.
A write of a state that is not supported completes and changes nothing, as the specification asks.
"""

from __future__ import annotations

import enum
import struct
from typing import TYPE_CHECKING, Final

from vfio_user_virtio.pci.config_space import ConfigEvents

if TYPE_CHECKING:
    from vfio_user_virtio.pci.config_space import ConfigSpace

CAPABILITY_ID: Final = 0x01
_BODY: Final = struct.Struct("<HHBB")
assert _BODY.size == 6

PMCSR: Final = 0x04
"""Offset of Control/Status in the capability."""
_POWER_STATE: Final = 0x3
_VERSION_3: Final = 3


class PowerState(enum.IntEnum):
    """PMCSR.PowerState, as far as supported."""

    D0 = 0
    D3HOT = 3


_EVENTS: Final = {
    (PowerState.D0, PowerState.D3HOT): ConfigEvents.POWER_D3,
    (PowerState.D3HOT, PowerState.D0): ConfigEvents.POWER_D0,
}


class PowerManagement:
    """The capability in `config`; writes yield `ConfigEvents.POWER_D3` and `POWER_D0`."""

    def __init__(self, config: ConfigSpace) -> None:
        self._registers = config.registers
        self.offset = config.add_capability(
            CAPABILITY_ID, _BODY.pack(_VERSION_3, 0, 0, 0), _BODY.pack(0, _POWER_STATE, 0, 0)
        )
        config.watch(self.offset + PMCSR, 2, _pmcsr_written)

    @property
    def state(self) -> PowerState:
        """The state that the function is in."""
        return PowerState(self._registers.load(self.offset + PMCSR, 2) & _POWER_STATE)


def _pmcsr_written(before: int, after: int, ones: int) -> tuple[int, ConfigEvents]:
    old, new = before & _POWER_STATE, after & _POWER_STATE
    if new not in (PowerState.D0, PowerState.D3HOT):
        return before, ConfigEvents.NONE
    return after, _EVENTS.get((PowerState(old), PowerState(new)), ConfigEvents.NONE)
