"""A PCI function of a VM, reached from outside: `pci_state.PciAccess` over the test protocol.

Configuration space is reached by the I/O ports 0xCF8 and 0xCFC (PCI Local Bus 3.0, 3.2.2.3.2),
which every x86 machine of QEMU has at the same place; ECAM would reach all of it, at an address
that the guest's firmware chooses.  The address register is the guest's: it may have been stopped
between its two accesses, so its value is put back.

The function is looked for by its id in ``query-pci``.  Its bus number comes from the bridges above
it, which the guest has numbered.  In a VM that waits for its guest nobody has, and nothing behind
them is reached: `GuestFunction.number_bridges` gives them the numbers that they have in another VM,
and will have when its guest has come.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import attrs

from vfio_user_virtio_server.vm.errors import QemuError
from vfio_user_virtio_server.vm.pci_state import Access

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from vfio_user_virtio_server.vm.qmp import Json, Qmp
    from vfio_user_virtio_server.vm.qtest import Qtest

_ADDRESS: Final = 0xCF8
_DATA: Final = 0xCFC
_ENABLE: Final = 1 << 31
_OUT: Final = {1: "outb", 2: "outw", 4: "outl"}

_HEADER: Final = 0x0C
_HEADER_TYPE: Final = 0x7F_0000
_BRIDGE: Final = 0x01_0000
_PRIMARY_BUS: Final = 0x18
_SUBORDINATE_BUS: Final = 0x1A
"""Of a bridge (PCI-to-PCI Bridge Architecture 1.2, 3.2)."""


@attrs.frozen
class Bdf:
    """Where a function is: bus, device and function number."""

    bus: int
    slot: int
    function: int

    def __str__(self) -> str:
        return f"{self.bus:02x}:{self.slot:02x}.{self.function}"

    def config_address(self, offset: int) -> int:
        """What 0xCF8 takes for the word that has `offset` in it."""
        place = self.bus << 16 | self.slot << 11 | self.function << 8
        return _ENABLE | place | offset & 0xFC


@attrs.frozen
class Bridge:
    """A bridge, and the numbers of the first and the last bus behind it."""

    bdf: Bdf
    secondary: int
    subordinate: int


@attrs.frozen
class Way:
    """Where a function is, and the bridges that lead there, from the root on."""

    bdf: Bdf
    bridges: tuple[Bridge, ...] = ()


def find_untrusted(buses: Json, ident: str) -> Way:
    """The function of device `ident` in what ``query-pci`` returned.  Raises QemuError."""
    for name, way in _functions(buses, ()):
        if name == ident:
            return way
    raise QemuError(f"no PCI bus that the guest has numbered has device {ident}")


def _functions(buses: Json, above: tuple[Bridge, ...]) -> Iterator[tuple[str, Way]]:
    for bus in buses if isinstance(buses, list) else ():
        match bus:
            case {"devices": [*devices]}:
                for device in devices:
                    yield from _function(device, above)


def _function(device: Json, above: tuple[Bridge, ...]) -> Iterator[tuple[str, Way]]:
    match device:
        case {
            "qdev_id": str(name),
            "bus": int(bus),
            "slot": int(slot),
            "function": int(function),
            **more,
        }:
            bdf = Bdf(bus, slot, function)
            yield name, Way(bdf, above)
            match more:
                case {
                    "pci_bridge": {
                        "bus": {"secondary": int(first), "subordinate": int(last)},
                        "devices": [*_] as behind,
                    }
                }:
                    yield from _functions([{"devices": behind}], (*above, Bridge(bdf, first, last)))


class GuestFunction:
    """The function at the end of `way` in the VM behind `qtest`.  A `PciAccess`."""

    def __init__(self, qtest: Qtest, way: Way) -> None:
        self.way = way
        self._qtest = qtest

    @classmethod
    async def find(cls, qmp: Qmp, qtest: Qtest, ident: str) -> GuestFunction:
        """That of the device with `ident`.  Raises QemuError."""
        return cls(qtest, find_untrusted(await qmp.execute("query-pci"), ident))

    async def number_bridges(self) -> None:
        """Give the bridges above the numbers that `way` says.  Raises QemuError."""
        for bridge in self.way.bridges:
            above = GuestFunction(self._qtest, Way(bridge.bdf))
            (header,) = await above.run([Access(_HEADER)])
            if header & _HEADER_TYPE != _BRIDGE:
                raise QemuError(f"{self._qtest.name} has no bridge at {bridge.bdf}")
            buses = bridge.bdf.bus | bridge.secondary << 8
            await above.run(
                [Access(_PRIMARY_BUS, buses, 2), Access(_SUBORDINATE_BUS, bridge.subordinate, 1)]
            )

    async def run(self, accesses: Sequence[Access]) -> list[int]:
        """See `PciAccess.run`."""
        commands = [command for one in accesses for command in self._commands(one)]
        if not all(one.memory for one in accesses):
            (address,) = await self._qtest.ask([f"inl {_ADDRESS:#x}"])
            commands.append(f"outl {_ADDRESS:#x} {address:#x}")
        answers = await self._qtest.run(commands)
        return [value for value in answers if value is not None]

    def _commands(self, access: Access) -> tuple[str, ...]:
        address, value = access.address, access.value
        if access.memory:
            return (f"readl {address:#x}" if value is None else f"writel {address:#x} {value:#x}",)
        select = f"outl {_ADDRESS:#x} {self.way.bdf.config_address(address):#x}"
        if value is None:
            return select, f"inl {_DATA:#x}"
        return select, f"{_OUT[access.size]} {_DATA + (address & 3):#x} {value:#x}"
