"""What the guest's own virtio_net driver does with a served device that is wired to a TAP."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs
import pytest

from tests.e2e import traffic
from tests.e2e.served import SLOT_1, TAP_MACHINE, guest_on_tap

if TYPE_CHECKING:
    from pathlib import Path

    from tests.testbed.bed import Bed
    from tests.testbed.netns import Netns

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

OTHER_MAC = "02:00:00:00:00:98"
GROUP_MAC = "01:00:5e:01:02:03"
OTHER_GROUP_MAC = "01:00:5e:01:02:04"
BROADCAST = "ff:ff:ff:ff:ff:ff"
NEW_MAC = "52:54:00:00:00:77"


async def test_ping_tcp_and_udp(bed: Bed, netns: Netns, tmp_path: Path) -> None:
    async with guest_on_tap(bed, netns, tmp_path) as guest:
        await traffic.check_ping(guest, netns)
        await traffic.check_tcp(guest, netns, mebibytes=64)
        await traffic.check_udp(guest, netns)
        await traffic.check_integrity(guest, netns)
        interrupts = await guest.run("grep virtio0 /proc/interrupts")
        assert "MSIX" in interrupts, interrupts
        assert traffic.MAC in await guest.run("cat /sys/class/net/eth0/address")

        await guest.run("ip address add fd00::2/64 dev eth0 nodad")
        await netns.run("ip", "address", "add", "fd00::1/64", "dev", traffic.TAP, "nodad")
        await traffic.check_tcp(guest, netns, host="fd00::1")


async def test_offloads_on_and_off(bed: Bed, netns: Netns, tmp_path: Path) -> None:
    sending = ("tx-checksum-ip-generic", "tx-tcp-segmentation", "tx-tcp6-segmentation")
    receiving = "rx-gro-hw"
    async with guest_on_tap(bed, netns, tmp_path) as guest:
        features = await guest.run("ethtool -k eth0")
        for name in (*sending, receiving):
            assert f"{name}: on\n" in features, features
        for switch in ("tso off", "gso off", "tx off", "gro off rx-gro-hw off", "sg off"):
            await guest.run(f"ethtool -K eth0 {switch}")
            await traffic.check_integrity(guest, netns, mebibytes=2)
        features = await guest.run("ethtool -k eth0")
        for name in (*sending, receiving):
            assert f"{name}: off\n" in features, features
        await guest.run("ethtool -K eth0 sg on tx on tso on gso on gro on rx-gro-hw on")
        await traffic.check_tcp(guest, netns)
        await traffic.check_integrity(guest, netns)


async def test_filters(bed: Bed, netns: Netns, tmp_path: Path) -> None:
    """Unicast, multicast and VLAN filters, and what turns them off."""
    await netns.disable_ipv6()
    machine = attrs.evolve(TAP_MACHINE, modules=("virtio_net", "8021q", "macvlan"))
    async with (
        guest_on_tap(bed, netns, tmp_path, machine=machine) as guest,
        traffic.FrameProbe.open(guest, netns) as probe,
    ):
        assert await probe.arrivals(traffic.MAC) == 8, "its own address"
        assert await probe.arrivals(BROADCAST) == 8, "broadcast"
        assert await probe.arrivals(OTHER_MAC) == 0, "another's address"
        assert await probe.arrivals(GROUP_MAC) == 0, "a group that nobody joined"
        await guest.run(f"ip maddr add {GROUP_MAC} dev eth0")
        assert await probe.arrivals(GROUP_MAC) == 8, "a group that was joined"
        assert await probe.arrivals(OTHER_GROUP_MAC) == 0, "another group"
        await guest.run("ip link set eth0 allmulticast on")
        assert await probe.arrivals(OTHER_GROUP_MAC) == 8, "all multicast"
        await guest.run("ip link set eth0 allmulticast off promisc on")
        assert await probe.arrivals(OTHER_MAC) == 8, "promiscuous"
        await guest.run("ip link set eth0 promisc off")
        assert await probe.arrivals(OTHER_MAC) == 0, "promiscuous no more"
        await guest.run(
            f"ip link add link eth0 name mac0 address {OTHER_MAC} type macvlan && "
            "ip link set mac0 up"
        )
        assert await probe.arrivals(OTHER_MAC) == 8, "a second unicast address"

        assert await probe.arrivals(traffic.MAC, vlan=5) == 0, "a VLAN that is not set up"
        await guest.run("ip link add link eth0 name eth0.5 type vlan id 5 && ip link set eth0.5 up")
        assert await probe.arrivals(traffic.MAC, vlan=5) == 8, "a VLAN that is"
        assert await probe.arrivals(traffic.MAC, vlan=6) == 0, "another VLAN"

        await guest.run(f"ip link set eth0 address {NEW_MAC}")
        assert await probe.arrivals(NEW_MAC, reached_at=NEW_MAC) == 8, "a new address"
        assert await probe.arrivals(traffic.MAC, reached_at=NEW_MAC) == 0, "the one before"


async def test_mtu_9000(bed: Bed, netns: Netns, tmp_path: Path) -> None:
    async with guest_on_tap(bed, netns, tmp_path, "--mtu", "9000", mtu=9000) as guest:
        assert int(await guest.run("cat /sys/class/net/eth0/mtu")) == 9000
        await guest.run(f"ping -c 2 -i 0.2 -W 5 -s 8972 {traffic.HOST}")
        await netns.run("ping", "-c", "2", "-i", "0.2", "-W", "5", "-s", "8972", traffic.GUEST)
        await guest.run("ethtool -K eth0 tso off gso off")
        await traffic.check_tcp(guest, netns)
        await traffic.check_integrity(guest, netns)


async def test_multiqueue(bed: Bed, netns: Netns, tmp_path: Path) -> None:
    machine = attrs.evolve(TAP_MACHINE, cpus=2)
    async with guest_on_tap(bed, netns, tmp_path, "--queue-pairs", "4", machine=machine) as guest:
        for pairs in (4, 1, 2):
            await guest.run(f"ethtool -L eth0 combined {pairs}")
            await traffic.check_tcp(guest, netns, streams=4)
            await traffic.check_ping(guest, netns)
        lines = (await guest.run("grep 'virtio0-output' /proc/interrupts")).splitlines()
        used = [line for line in lines if sum(map(int, line.split()[1:3]))]
        assert len(used) >= 2, lines


async def test_interrupt_line(bed: Bed, netns: Netns, tmp_path: Path) -> None:
    """A guest without MSI-X: one level-triggered line for all queues."""
    machine = attrs.evolve(TAP_MACHINE, append="pci=nomsi")
    async with guest_on_tap(bed, netns, tmp_path, machine=machine) as guest:
        interrupts = await guest.run("grep virtio0 /proc/interrupts")
        assert "fasteoi" in interrupts, interrupts
        await traffic.check_ping(guest, netns)
        await traffic.check_tcp(guest, netns)
        await guest.run(f"echo {SLOT_1} >/sys/bus/pci/drivers/virtio-pci/unbind")
