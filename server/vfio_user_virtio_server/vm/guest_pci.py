"""A PCI function of a VM, reached from outside: `pci_state.PciAccess` over the test protocol.

Configuration space is reached by the I/O ports 0xCF8 and 0xCFC (PCI Local Bus 3.0, 3.2.2.3.2),
which every x86 machine of QEMU has at the same place; ECAM would reach all of it, at an address
that the guest's firmware chooses.  The address register is the guest's: it may have been stopped
between its two accesses, so its value is put back.

The function is looked for by its id in ``query-pci`` each time a VM has been loaded: its bus number
comes from the bridges above it, which the guest has numbered.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import attrs

from vfio_user_virtio_server.vm.errors import QemuError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from vfio_user_virtio_server.vm.qmp import Json, Qmp
    from vfio_user_virtio_server.vm.qtest import Qtest

_ADDRESS: Final = 0xCF8
_DATA: Final = 0xCFC
_ENABLE: Final = 1 << 31
_OUT: Final = {1: "outb", 2: "outw", 4: "outl"}


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


def find_untrusted(buses: Json, ident: str) -> Bdf:
    """The function of device `ident` in what ``query-pci`` returned.  Raises QemuError."""
    for device in _devices(buses):
        match device:
            case {
                "qdev_id": str(name),
                "bus": int(bus),
                "slot": int(slot),
                "function": int(function),
            } if name == ident:
                return Bdf(bus, slot, function)
    raise QemuError(f"no PCI bus that the guest has numbered has device {ident}")


def _devices(buses: Json) -> Iterator[Json]:
    for bus in buses if isinstance(buses, list) else ():
        match bus:
            case {"devices": [*devices]}:
                for device in devices:
                    yield device
                    match device:
                        case {"pci_bridge": {"bus": _, "devices": [*_] as behind}}:
                            yield from _devices([{"devices": behind}])


class GuestFunction:
    """The function at `bdf` of the VM behind `qtest`.  A `PciAccess`."""

    def __init__(self, qtest: Qtest, bdf: Bdf) -> None:
        self.bdf = bdf
        self._qtest = qtest

    @classmethod
    async def find(cls, qmp: Qmp, qtest: Qtest, ident: str) -> GuestFunction:
        """That of the device with `ident`.  Raises QemuError."""
        return cls(qtest, find_untrusted(await qmp.execute("query-pci"), ident))

    async def read_config(self, offsets: Sequence[int]) -> list[int]:
        address = await self._address()
        commands = []
        for offset in offsets:
            commands += [self._select(offset), f"inl {_DATA:#x}"]
        answers = await self._qtest.run([*commands, f"outl {_ADDRESS:#x} {address:#x}"])
        return [value for value in answers if value is not None]

    async def write_config(self, writes: Sequence[tuple[int, int, int]]) -> None:
        address = await self._address()
        commands = []
        for offset, size, value in writes:
            commands += [
                self._select(offset),
                f"{_OUT[size]} {_DATA + (offset & 3):#x} {value:#x}",
            ]
        await self._qtest.run([*commands, f"outl {_ADDRESS:#x} {address:#x}"])

    async def read_memory(self, addresses: Sequence[int]) -> list[int]:
        return await self._qtest.ask([f"readl {address:#x}" for address in addresses])

    async def write_memory(self, writes: Sequence[tuple[int, int]]) -> None:
        await self._qtest.run([f"writel {address:#x} {word:#x}" for address, word in writes])

    async def _address(self) -> int:
        (address,) = await self._qtest.ask([f"inl {_ADDRESS:#x}"])
        return address

    def _select(self, offset: int) -> str:
        return f"outl {_ADDRESS:#x} {self.bdf.config_address(offset):#x}"
