"""The parts of a guest driver that a well-behaved device never exercises, and how they fit."""

from __future__ import annotations

import os
import struct
from typing import TYPE_CHECKING

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from vfio_user_virtio.backends.software.config import MemberConfig
from vfio_user_virtio.backends.software.owner import Owner
from vfio_user_virtio.testing.control_commands import ControlCommands, ControlRefused
from vfio_user_virtio.testing.driver_queue import DeviceBroke, QueueFull
from vfio_user_virtio.testing.guest_ram import GuestRam
from vfio_user_virtio.testing.interrupt import Interrupt
from vfio_user_virtio.testing.loopback import served
from vfio_user_virtio.testing.net_driver import (
    KNOWN_FEATURES,
    LARGE_BUFFER,
    MERGEABLE_BUFFER,
    SMALL_BUFFER,
    NetDriver,
    consistent,
)
from vfio_user_virtio.testing.net_header import NetHeader, decode_net_header
from vfio_user_virtio.testing.virtio_pci import (
    CAP_MSIX,
    CAP_PCI_EXPRESS,
    CAP_POWER_MANAGEMENT,
    PciClient,
    Register,
    VirtioPci,
    find_capabilities,
)
from vfio_user_virtio.virtio.common_config import Status
from vfio_user_virtio.virtio.features import Feature, mask_of, refusal_untrusted
from vfio_user_virtio.virtio.pci_capabilities import CfgType

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from vfio_user_virtio.device import IrqRequest

MAC = bytes.fromhex("020000000001")


# --- capabilities -------------------------------------------------------------------------------


def config_space(*capabilities: tuple[int, bytes]) -> bytes:
    """Configuration space with these capabilities, as (offset, bytes with a right next field)."""
    space = bytearray(256)
    space[0x34] = capabilities[0][0] if capabilities else 0
    for offset, data in capabilities:
        space[offset : offset + len(data)] = data
    return bytes(space)


def test_capabilities_are_found_in_the_order_of_the_list() -> None:
    common = bytes([9, 0x80, 16, 1, 4, 0, 0, 0]) + struct.pack("<II", 0x1000, 64)
    notify = bytes([9, 0x60, 20, 2, 2, 0, 0, 0]) + struct.pack("<III", 0x3000, 0x100, 4)
    msix = bytes([0x11, 0, 0, 0])
    space = config_space((0x40, common), (0x80, notify), (0x60, msix))
    first, virtio = find_capabilities(space)
    assert first == {9: 0x40, 0x11: 0x60}
    assert [(c.cfg_type, c.bar, c.offset, c.length, c.multiplier) for c in virtio] == [
        (1, 4, 0x1000, 64, 0),
        (2, 2, 0x3000, 0x100, 4),
    ]
    assert find_capabilities(config_space()) == ({}, [])


@pytest.mark.parametrize(
    "space",
    [
        config_space((0x40, b"\x01\x40")),
        config_space((0x40, b"\x01\x50"), (0x50, b"\x05\x40")),
        config_space((0x40, b"\x01\x20")),
        config_space((0x40, b"\x01\xf4")),
    ],
)
def test_a_list_that_leads_nowhere_is_found_out(space: bytes) -> None:
    with pytest.raises(DeviceBroke, match="capability list goes to"):
        find_capabilities(space)


@given(st.binary(min_size=256, max_size=256))
def test_any_configuration_space_is_walked_or_refused(space: bytes) -> None:
    try:
        first, virtio = find_capabilities(space)
    except DeviceBroke:
        return
    assert all(space[position] == kind for kind, position in first.items())
    assert len(virtio) == sum(space[c.position] == 9 for c in virtio)


# --- features -----------------------------------------------------------------------------------


@given(st.integers(0, (1 << 64) - 1))
def test_what_a_driver_asks_for_is_consistent(features: int) -> None:
    asked = consistent(features & KNOWN_FEATURES | Feature.VERSION_1.mask)
    assert refusal_untrusted(KNOWN_FEATURES, asked) is None
    assert consistent(asked) == asked


def test_one_feature_takes_those_that_need_it_along() -> None:
    rest = consistent(KNOWN_FEATURES & ~Feature.CTRL_VQ.mask)
    gone = (Feature.CTRL_RX, Feature.CTRL_VLAN, Feature.MQ, Feature.CTRL_MAC_ADDR)
    assert not rest & mask_of(gone)
    rest = consistent(KNOWN_FEATURES & ~Feature.GUEST_CSUM.mask)
    assert not rest & mask_of((Feature.GUEST_TSO4, Feature.GUEST_TSO6, Feature.GUEST_ECN))
    assert rest & Feature.HOST_TSO4.mask


# --- headers and control ------------------------------------------------------------------------


@given(st.binary(min_size=12, max_size=40))
def test_headers_are_what_they_are_made_of(data: bytes) -> None:
    assert decode_net_header(data).encode() == data[:12]


def test_a_header_has_twelve_bytes() -> None:
    assert NetHeader(1, 2, 3, 4, 5, 6, 7).encode().hex(" ") == "01 02 03 00 04 00 05 00 06 00 07 00"
    with pytest.raises(ValueError, match="11 bytes hold no"):
        decode_net_header(bytes(11))


async def test_commands_as_they_are_sent() -> None:
    sent: list[str] = []

    async def execute(command_class: int, command: int, data: bytes) -> int:
        sent.append(f"{command_class}.{command} {data.hex()}")
        return 0

    control = ControlCommands(execute)
    await control.set_rx_mode("nobcast", True)
    await control.set_mac_table([MAC], [])
    await control.set_mac(MAC)
    await control.add_vlan(258)
    await control.remove_vlan(1)
    await control.acknowledge_announcement()
    await control.set_pairs(3)
    await control.set_offloads(2)
    assert sent == [
        "0.5 01",
        "1.0 01000000" + MAC.hex() + "00000000",
        "1.1 " + MAC.hex(),
        "2.0 0201",
        "2.1 0100",
        "3.0 ",
        "4.0 0300",
        "5.0 0200000000000000",
    ]


async def test_a_refusal_says_what_was_refused() -> None:
    async def execute(command_class: int, command: int, data: bytes) -> int:
        return 1

    with pytest.raises(
        ControlRefused, match="ANNOUNCE command 0 with no data: the device answered"
    ):
        await ControlCommands(execute).acknowledge_announcement()


# --- interrupts ---------------------------------------------------------------------------------


async def test_who_waits_while_an_interrupt_is_acknowledged_looks_again(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """What the device did before it saw the acknowledgement brings no further interrupt."""

    async def acknowledge() -> None:
        await trio.sleep(10)

    interrupt = Interrupt(acknowledge)
    woken: list[float] = []

    async def wait(after: float) -> None:
        await trio.sleep(after)
        await interrupt.wait()
        woken.append(trio.current_time() - start)

    start = trio.current_time()
    async with trio.open_nursery() as nursery:
        for after in (0, 5):
            nursery.start_soon(wait, after)
        await trio.sleep(1)
        os.eventfd_write(interrupt.fd, 1)
    assert woken == pytest.approx([11, 11])
    assert interrupt.count == 1
    interrupt.close()


async def test_everybody_who_waits_for_an_interrupt_hears_of_it() -> None:
    interrupt = Interrupt()
    heard: list[int] = []

    async def wait(name: int) -> None:
        await interrupt.wait(0)
        heard.append(name)

    async with trio.open_nursery() as nursery:
        for name in range(3):
            nursery.start_soon(wait, name)
        await trio.testing.wait_all_tasks_blocked()
        assert heard == []
        os.eventfd_write(interrupt.fd, 5)
    assert sorted(heard) == [0, 1, 2]
    assert interrupt.count == 1
    assert not interrupt.poll()
    await interrupt.wait(0)
    interrupt.close()
    interrupt.close()


async def test_a_reader_that_is_cancelled_is_replaced() -> None:
    interrupt = Interrupt()
    first = trio.CancelScope()
    heard: list[str] = []

    async def impatient() -> None:
        with first:
            await interrupt.wait()

    async def patient() -> None:
        await interrupt.wait()
        heard.append("patient")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(impatient)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(patient)
        await trio.testing.wait_all_tasks_blocked()
        first.cancel()
        await trio.testing.wait_all_tasks_blocked()
        os.eventfd_write(interrupt.fd, 1)
    assert heard == ["patient"]
    interrupt.close()


# --- a device whose registers can be spoilt -----------------------------------------------------


class Spoilt:
    """A client whose reads of a register, by region and offset, give other values in turn."""

    def __init__(self, client: PciClient) -> None:
        self._client = client
        self.spoil: dict[tuple[int, int], list[bytes]] = {}

    async def region_read(self, index: int, offset: int, count: int) -> bytes:
        data = await self._client.region_read(index, offset, count)
        values = self.spoil.get((index, offset))
        if not values:
            return data
        return values.pop(0) if len(values) > 1 else values[0]

    async def region_write(
        self, index: int, offset: int, data: bytes, *, no_reply: bool = False
    ) -> None:
        await self._client.region_write(index, offset, data, no_reply=no_reply)

    async def set_irqs(self, request: IrqRequest) -> None:
        await self._client.set_irqs(request)


@pytest.fixture
async def rig() -> AsyncIterator[tuple[NetDriver, Spoilt]]:
    """A driver of a member that nobody else is connected to."""
    member = Owner("owner").add_member(MemberConfig(mac=MAC, mtu=1500))
    with GuestRam() as ram:
        async with served(member, memory=ram) as client:
            await ram.map(client)
            spoilt = Spoilt(client)
            pci = await VirtioPci.open(spoilt)
            yield NetDriver(pci, ram, rx_buffers=4), spoilt
            pci.close()


def place(pci: VirtioPci, register: Register) -> tuple[int, int]:
    return pci.common.bar, pci.common.offset + register.value[0]


async def test_structures_and_registers(rig: tuple[NetDriver, Spoilt]) -> None:
    pci = rig[0].pci
    assert {CAP_MSIX, CAP_PCI_EXPRESS, CAP_POWER_MANAGEMENT} <= set(pci.pci_capabilities)
    assert pci.structure(CfgType.DEVICE).length >= 20
    with pytest.raises(DeviceBroke, match="no SHARED_MEMORY structure"):
        pci.structure(CfgType.SHARED_MEMORY)
    await pci.write(Register.QUEUE_SELECT, 1)
    await pci.write(Register.QUEUE_DESC, 0x1234_5678_9ABC_DEF0)
    assert await pci.read_half(Register.QUEUE_DESC, 0) == 0x9ABC_DEF0
    assert await pci.read_half(Register.QUEUE_DESC, 1) == 0x1234_5678
    with pytest.raises(ValueError, match="read_half"):
        await pci.read(Register.QUEUE_DESC)


async def test_the_configuration_is_read_of_one_piece(rig: tuple[NetDriver, Spoilt]) -> None:
    driver, spoilt = rig
    at = place(driver.pci, Register.CONFIG_GENERATION)
    spoilt.spoil[at] = [b"\0", b"\1", b"\2", b"\3", b"\3"]
    assert (await driver.config()).mac == MAC
    assert spoilt.spoil[at] == [b"\3"]


async def test_a_device_that_never_resets_is_given_up(
    rig: tuple[NetDriver, Spoilt], autojump_clock: trio.testing.MockClock
) -> None:
    driver, spoilt = rig
    spoilt.spoil[place(driver.pci, Register.DEVICE_STATUS)] = [b"\1"]
    with pytest.raises(DeviceBroke, match="not 0 long after a reset"):
        await driver.start()


async def test_a_device_that_keeps_a_queue_or_refuses_a_vector(
    rig: tuple[NetDriver, Spoilt],
) -> None:
    driver, spoilt = rig
    await driver.start()
    spoilt.spoil[place(driver.pci, Register.QUEUE_ENABLE)] = [b"\1\0"]
    with pytest.raises(DeviceBroke, match="still enabled"):
        await driver.reset_queue(0)
    spoilt.spoil = {place(driver.pci, Register.QUEUE_MSIX_VECTOR): [b"\xff\xff"]}
    with pytest.raises(DeviceBroke, match="did not take vector 1"):
        await driver.start()


@pytest.mark.parametrize(
    ("lengths", "num_buffers", "message"),
    [
        ((100,), 0, "num_buffers is 0"),
        ((100,), 300, "num_buffers is 300"),
        ((0,), 1, "came back empty"),
        ((100, 100), 2, "100 bytes in a buffer that is not the last"),
    ],
)
async def test_a_frame_that_is_put_together_wrongly_is_found_out(
    rig: tuple[NetDriver, Spoilt], lengths: tuple[int, ...], num_buffers: int, message: str
) -> None:
    driver, _ = rig
    await driver.start()
    ring = driver.queue(0).ring
    used = driver.ram.view(ring.device, 6 + 8 * ring.size)
    for position, length in enumerate(lengths):
        head = struct.unpack_from("<H", driver.ram.view(ring.driver, 64), 4 + 2 * position)[0]
        address = struct.unpack_from("<Q", driver.ram.view(ring.desc + 16 * head, 16))[0]
        driver.ram.view(address, 12)[:] = NetHeader(num_buffers=num_buffers).encode()
        struct.pack_into("<II", used, 4 + 8 * position, head, length)
    struct.pack_into("<H", used, 2, len(lengths))
    with pytest.raises(DeviceBroke, match=message):
        await driver.receive()


async def test_what_the_features_ask_of_receive_buffers(rig: tuple[NetDriver, Spoilt]) -> None:
    driver, _ = rig
    for features, size in (
        (KNOWN_FEATURES, MERGEABLE_BUFFER),
        (KNOWN_FEATURES & ~Feature.MRG_RXBUF.mask, LARGE_BUFFER),
        (Feature.VERSION_1.mask, SMALL_BUFFER),
    ):
        again = NetDriver(driver.pci, driver.ram, features=features, rx_buffers=4)
        await again.start()
        assert again.rx_buffer_size == size
        assert again.queue(0).outstanding == 4
        await again.stop()


async def test_posting_stops_when_the_queue_is_full(rig: tuple[NetDriver, Spoilt]) -> None:
    driver, _ = rig
    await driver.start()
    assert driver.queue(0).outstanding == 4
    await driver.post(buffers=1000)
    assert driver.queue(0).outstanding == driver.queue(0).size


async def test_stopping_gives_all_memory_back(rig: tuple[NetDriver, Spoilt]) -> None:
    driver, _ = rig
    await driver.start()
    await driver.send(b"\xff" * 60)
    await driver.stop()
    free = driver.ram.allocated
    for _ in range(3):
        await driver.start()
        await driver.send(b"\xff" * 60)
        await driver.stop()
        assert driver.ram.allocated == free == 0
    assert await driver.pci.status() == Status(0)


async def test_a_frame_too_large_for_the_ring_is_the_callers_mistake(
    rig: tuple[NetDriver, Spoilt],
) -> None:
    driver, _ = rig
    small = NetDriver(driver.pci, driver.ram, features=Feature.VERSION_1.mask, queue_size=4)
    await small.start()
    with pytest.raises(QueueFull):
        await small.send(bytes(60), segments=(1,) * 10)
