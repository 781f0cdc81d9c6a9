"""PCI state taken from one function and put into another: on a model, and on real QEMUs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.server.vm.bare_qemu import bare_qemu
from vfio_user_virtio.pci.config_space import COMMAND, Command, ConfigSpace, Identity, MemoryBar
from vfio_user_virtio.pci.msix import MsixCapability, msix_table
from vfio_user_virtio.pci.pcie_capability import add_pcie_capability
from vfio_user_virtio.pci.power_management import PowerManagement
from vfio_user_virtio.virtio.pci_capabilities import CfgType, Structure, add_structure
from vfio_user_virtio_server.vm import pci_state
from vfio_user_virtio_server.vm.errors import QemuError
from vfio_user_virtio_server.vm.guest_pci import Bdf, Bridge, GuestFunction, Way, find_untrusted
from vfio_user_virtio_server.vm.pci_state import Access
from vfio_user_virtio_server.vm.qtest import decode_answer_untrusted, open_qtest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.testbed.bed import Bed
    from vfio_user_virtio_server.vm.pci_state import PciState
    from vfio_user_virtio_server.vm.qmp import Json

VECTORS = 3
TABLE_AT = 0xFEB0_0000
VIRTIO_AT = 0x8_0000_4000
MSIX_BAR = 1
VIRTIO_BAR = 4


class Model:
    """A function like ours, whose MSI-X table is where its BAR says, if it decodes memory."""

    def __init__(self, device: int = 0x1041) -> None:
        self.config = ConfigSpace(
            Identity(0x1AF4, device, 0x020000, 1, 0x1AF4, 0x1100),
            {
                MSIX_BAR: MemoryBar(0x1000),
                VIRTIO_BAR: MemoryBar(0x4000, is_64bit=True, prefetchable=True),
            },
        )
        self.msix = MsixCapability(
            self.config, VECTORS, table_bar=1, table_offset=0, pba_bar=1, pba_offset=0x800
        )
        add_structure(self.config, Structure(CfgType.COMMON, VIRTIO_BAR, 0, 64))
        self.express = add_pcie_capability(self.config)
        PowerManagement(self.config)
        self.table = msix_table(VECTORS)
        self.order: list[str] = []

    async def run(self, accesses: Sequence[Access]) -> list[int]:
        return [value for one in accesses if (value := self.do(one)) is not None]

    def do(self, access: Access) -> int | None:
        if access.value is None:
            found = (
                self.table.read(self._within(access.address), 4)
                if access.memory
                else self.config.read(access.address, 4)
            )
            return int.from_bytes(found, "little")
        data = access.value.to_bytes(access.size, "little")
        if access.memory:
            self.order += ["table"] * (self.order[-1:] != ["table"])
            self.table.write(self._within(access.address), data)
            return None
        was_on = self.msix.enabled
        self.config.write(access.address, data)
        self.order += ["MSI-X on"] * (self.msix.enabled and not was_on)
        return None

    def _within(self, address: int) -> int:
        assert self.config.command & Command.MEMORY
        return address - int.from_bytes(self.config.read(0x14, 4), "little")

    def set_up(self) -> None:
        """As a driver does."""
        self.config.write(0x14, TABLE_AT.to_bytes(4, "little"))
        self.config.write(0x20, VIRTIO_AT.to_bytes(8, "little"))
        self.config.write(0x3C, b"\x0b")
        self.config.write(COMMAND, (Command.MEMORY | Command.MASTER).to_bytes(2, "little"))
        for vector in range(VECTORS - 1):
            entry = (0xFEE0_1000 + vector).to_bytes(8, "little") + bytes([vector, 0x41]) + bytes(6)
            self.table.write(16 * vector, entry)
        self.config.write(self.msix.offset + 2, b"\x00\x80")
        self.config.write(self.express + 8, b"\x30\x50")


async def captured(here: Model) -> PciState:
    return await pci_state.capture(here, await pci_state.read_config(here))


async def put(there: Model, state: PciState) -> None:
    await pci_state.restore(there, state, await pci_state.compare(there, state))


async def test_a_function_is_restored_whole() -> None:
    here, there = Model(), Model()
    looked_at = await pci_state.read_config(here)
    here.set_up()
    state = await pci_state.capture(here, looked_at)
    assert state.command == Command.MEMORY | Command.MASTER
    assert len(state.table) == 4 * VECTORS
    await put(there, state)
    assert there.config.state() == here.config.state()
    assert there.table.state() == here.table.state()
    assert there.order == ["table", "MSI-X on"], "all vectors are there when it is turned on"
    assert await captured(there) == state


async def test_only_state_is_read_of_a_guest_that_is_stopped() -> None:
    class Counting(Model):
        def __init__(self) -> None:
            super().__init__()
            self.read: list[int] = []

        async def run(self, accesses: Sequence[Access]) -> list[int]:
            self.read += [one.address for one in accesses if not one.memory]
            return await super().run(accesses)

    here = Counting()
    here.set_up()
    state = await pci_state.read_config(here)
    whole, here.read = here.read, []
    assert sorted(whole) == sorted(state.words())
    await pci_state.capture(here, state)
    assert {COMMAND, 0x3C, here.msix.offset} < set(here.read) < set(whole)
    assert len(here.read) < len(whole) / 2


async def test_one_that_nobody_has_set_up() -> None:
    here, there = Model(), Model()
    state = await captured(here)
    assert state.table == ()
    await put(there, state)
    assert there.config.state() == Model().config.state()


async def test_memory_decoding_is_turned_on_only_for_a_while() -> None:
    here, there = Model(), Model()
    here.set_up()
    here.config.write(COMMAND, bytes(2))
    before = here.config.state()
    state = await captured(here)
    assert here.config.state() == before
    await put(there, state)
    assert there.config.state() == before
    assert there.table.state() == here.table.state()


async def test_the_line_is_taken_from_the_bus_and_given_back() -> None:
    here = Model()
    here.set_up()
    state = await captured(here)
    await pci_state.without_intx(here, state)
    assert here.config.command == state.command, "with MSI-X there is no line"
    here.config.write(here.msix.offset + 2, bytes(2))
    state = await captured(here)
    await pci_state.without_intx(here, state)
    assert here.config.command == state.command | Command.INTX_DISABLE
    await pci_state.with_command(here, state)
    assert here.config.command == state.command


async def test_what_cannot_be_taken() -> None:
    here = Model()
    here.set_up()
    state = await pci_state.read_config(here)
    (power,) = state.capabilities[1]
    here.config.write(power + 4, b"\x03\x00")
    assert "D3" in (await pci_state.read_config(here)).refusals()[0]
    with pytest.raises(QemuError, match="sleep"):
        await pci_state.capture(here, state)


async def test_msi_is_refused() -> None:
    here = Model()
    msi = here.config.add_capability(5, bytes(12), b"\x01".ljust(12, b"\0"))
    assert (await pci_state.read_config(here)).refusals() == []
    state = await pci_state.read_config(here)
    here.config.write(msi + 2, b"\x01")
    assert "MSI" in (await pci_state.read_config(here)).refusals()[0]
    with pytest.raises(QemuError, match=f"does not answer as it did: byte {msi + 2:#x}"):
        await pci_state.capture(here, state)


async def test_msix_without_an_address() -> None:
    here = Model()
    here.config.write(here.msix.offset + 2, b"\x00\x80")
    with pytest.raises(QemuError, match="BAR1 with its table has no address"):
        await captured(here)


async def test_another_kind_of_function_is_told() -> None:
    here, there = Model(), Model(0x1042)
    here.set_up()
    state = await captured(here)
    with pytest.raises(QemuError, match="byte 0x2 of configuration space is 0x41 here and 0x42"):
        await pci_state.compare(there, state)
    assert there.config.state() == Model(0x1042).config.state()


async def test_what_is_not_kept_is_told() -> None:
    class Forgetful(Model):
        def do(self, access: Access) -> int | None:
            kept = access.address != 0x3C or access.value is None
            return super().do(access) if kept else None

    here, there = Model(), Forgetful()
    here.set_up()
    with pytest.raises(QemuError, match=r"register at 0x3c .* is 0x0 after 0xb was written"):
        await put(there, await captured(here))


async def test_a_chain_that_never_ends() -> None:
    class Looping(Model):
        def do(self, access: Access) -> int | None:
            return 0x0010_4041 if access.address >= 0x34 else 0xFFFF_FFFF

    state = await pci_state.read_config(Looping())
    assert state.capabilities == {0x41: [0x40]}


def test_functions_are_found_behind_bridges() -> None:
    behind: Json = {"qdev_id": "vf1", "bus": 3, "slot": 0, "function": 1}
    bridge: Json = {
        "qdev_id": "port1",
        "bus": 0,
        "slot": 1,
        "function": 0,
        "pci_bridge": {"bus": {"secondary": 3, "subordinate": 4}, "devices": [behind]},
    }
    found = find_untrusted([{"devices": [bridge]}], "vf1")
    assert str(found.bdf) == "03:00.1"
    assert found.bridges == (Bridge(Bdf(0, 1, 0), 3, 4),)
    assert find_untrusted([{"devices": [bridge]}], "port1") == Way(Bdf(0, 1, 0))
    unnumbered: Json = {
        "qdev_id": "port1",
        "bus": 0,
        "slot": 1,
        "function": 0,
        "pci_bridge": {"bus": {}, "devices": [behind]},
    }
    nowhere: list[Json] = [None, [], [None], [{"devices": 3}], [{"devices": [unnumbered]}]]
    for junk in (*nowhere, [{"devices": [{"qdev_id": "vf1"}]}]):
        with pytest.raises(QemuError, match="vf1"):
            find_untrusted(junk, "vf1")
    assert Bdf(3, 2, 1).config_address(0x13) == 0x8003_1110


def test_answers() -> None:
    assert decode_answer_untrusted(b"OK 0x0000000029c08086") == 0x29C08086
    assert decode_answer_untrusted(b"OK") is None
    for junk in (b"FAIL Unknown command", b"", b"OK maybe", b"\xff"):
        with pytest.raises(QemuError):
            decode_answer_untrusted(junk)


NIC = ("-device", "virtio-net-pci,id=nic,addr=5,vectors=3,romfile=")


@pytest.mark.slow
async def test_between_real_qemus(bed: Bed) -> None:
    """Its own virtio-net-pci has the same registers, and is on a bus that needs no guest."""
    async with (
        bare_qemu(bed, *NIC, name="source") as source,
        bare_qemu(bed, *NIC, name="target") as target,
        open_qtest(source) as source_qtest,
        open_qtest(target) as target_qtest,
    ):
        here = await GuestFunction.find(source, source_qtest, "nic")
        there = await GuestFunction.find(target, target_qtest, "nic")
        assert here.way == Way(Bdf(0, 5, 0))
        await source_qtest.run(["outl 0xcf8 0x80001234"])
        fresh = await pci_state.read_config(here)
        assert fresh == await pci_state.compare(there, fresh)
        (msix,) = fresh.capabilities[0x11]
        await here.run([Access(0x14, 0xFEBF_0000), Access(0x20, 0x4000), Access(0x24, 8)])
        await here.run(
            [Access(COMMAND, 0x406, 2), Access(0x3C, 10, 1), Access(msix + 2, 0x8000, 2)]
        )
        await here.run(
            [
                Access(0xFEBF_0000 + 4 * n, word, memory=True)
                for n, word in enumerate((0xFEE0_0000, 0, 0x4041, 0))
            ]
        )
        state = await pci_state.capture(here, fresh)
        assert state.load(0x24, 4) == 8
        assert state.table[:4] == (0xFEE0_0000, 0, 0x4041, 0)
        await pci_state.restore(there, state, fresh)
        assert await pci_state.capture(there, fresh) == state
        assert await source_qtest.ask(["inl 0xcf8"]) == [0x8000_1234], "the guest's own"
        with pytest.raises(QemuError, match="refused"):
            await source_qtest.run(["nonsense"])
        assert len(await source_qtest.ask(["inl 0xcf8"] * 600)) == 600


@pytest.mark.slow
async def test_the_test_protocol_is_found_again(bed: Bed) -> None:
    async with bare_qemu(bed) as qmp:
        for _ in range(3):
            async with open_qtest(qmp) as qtest:
                assert await qtest.ask(["inl 0xcf8"]) == [0]
        async with open_qtest(qmp) as qtest:
            await qmp.execute("quit")
            await qmp.wait_gone()
            for _ in range(2):
                with pytest.raises(QemuError):
                    await qtest.run(["inl 0xcf8"] * 3)
