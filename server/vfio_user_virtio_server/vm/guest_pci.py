"""A PCI function of a VM, reached from outside: `pci_state.PciAccess` over the test protocol.

Configuration space is reached in memory (ECAM, PCI Express Base 4.0, 7.2.2) where the firmware of a
q35 machine has switched that on; its address is a property of the machine.  Elsewhere, and while a
VM waits for its guest, by the I/O ports 0xCF8 and 0xCFC (PCI Local Bus 3.0, 3.2.2.3.2).  That takes
two accesses, and a guest that runs may make one of its own in between, to the wrong register then:
it has to stand still (`by_ports`).  It may have been stopped between its two, so what 0xCF8 had is
put back.

The function is looked for by its id in ``query-pci``.  Its bus number comes from the bridges above
it, which the guest has numbered.  In a VM that waits for its guest nobody has, and nothing behind
them is reached: `GuestFunction.number_bridges` gives them the numbers that they have in another VM,
and will have when its guest has come.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import attrs

from vfio_user_virtio_server.vm.errors import QemuError, QemuGone
from vfio_user_virtio_server.vm.pci_state import Access

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from vfio_user_virtio_server.vm.qmp import Json, Qmp
    from vfio_user_virtio_server.vm.qtest import Qtest

_ECAM_HOST: Final = "/machine/q35"
_ADDRESS: Final = 0xCF8
_DATA: Final = 0xCFC
_ENABLE: Final = 1 << 31
_OUT: Final = {1: "outb", 2: "outw", 4: "outl"}
_WRITE: Final = {1: "writeb", 2: "writew", 4: "writel"}

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

    @property
    def ecam_offset(self) -> int:
        """Its configuration space, from where that of all functions is."""
        return self.bus << 20 | self.slot << 15 | self.function << 12

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


async def _ecam_of(qmp: Qmp, bdf: Bdf) -> int | None:
    """Where the function's configuration space is in memory, if it is.  Raises QemuGone."""
    try:
        base = await qmp.execute("qom-get", path=_ECAM_HOST, property="MCFG")
        size = await qmp.execute("qom-get", path=_ECAM_HOST, property="mcfg_size")
    except QemuGone:
        raise
    except QemuError:  # another machine
        return None
    match base, size:
        case int(), int() if bdf.ecam_offset < size:
            return base + bdf.ecam_offset
        case _:
            return None


class GuestFunction:
    """The function at the end of `way` in the VM behind `qtest`.  A `PciAccess`.

    `ecam`: where its configuration space is in memory, None if it is not there.
    """

    def __init__(self, qtest: Qtest, way: Way, ecam: int | None = None) -> None:
        self.way = way
        self._qtest = qtest
        self._ecam = ecam

    @classmethod
    async def find(cls, qmp: Qmp, qtest: Qtest, ident: str) -> GuestFunction:
        """That of the device with `ident`.  Raises QemuError."""
        way = find_untrusted(await qmp.execute("query-pci"), ident)
        return cls(qtest, way, await _ecam_of(qmp, way.bdf))

    @property
    def by_ports(self) -> bool:
        """Whether the guest must not run while its configuration space is accessed."""
        return self._ecam is None

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
        if self.by_ports and not all(one.memory for one in accesses):
            (address,) = await self._qtest.ask([f"inl {_ADDRESS:#x}"])
            commands.append(f"outl {_ADDRESS:#x} {address:#x}")
        answers = await self._qtest.run(commands)
        return [value for value in answers if value is not None]

    def _commands(self, access: Access) -> tuple[str, ...]:
        address, value = access.address, access.value
        if access.memory:
            return (f"readl {address:#x}" if value is None else f"writel {address:#x} {value:#x}",)
        if self._ecam is not None:
            if value is None:
                return (f"readl {self._ecam + (address & ~3):#x}",)
            return (f"{_WRITE[access.size]} {self._ecam + address:#x} {value:#x}",)
        select = f"outl {_ADDRESS:#x} {self.way.bdf.config_address(address):#x}"
        if value is None:
            return select, f"inl {_DATA:#x}"
        return select, f"{_OUT[access.size]} {_DATA + (address & 3):#x} {value:#x}"
