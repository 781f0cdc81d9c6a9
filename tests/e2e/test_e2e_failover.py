"""The other way that stock QEMU offers: a failover pair, whose primary is ours.

A virtio-net of QEMU's own (``failover=on``) is the standby, our function (``failover_pair_id``) the
primary.  QEMU hides the primary until the guest's driver has taken STANDBY, has the guest give it
up before the first page is copied, and plugs it in again at the target, or at the source if the
migration fails.  So nothing of ours is moved: neither a state nor pages that the device wrote.

Which of the two carries the packets is for the guest to decide.  Linux's net_failover takes no
virtio-net for its primary (it asks for a netdev whose parent is a PCI device, while ours has a
virtio device in between), so that the guest needs a bond of both, and somebody who adds a primary
that comes back: a loop here, networkd or the like elsewhere.
"""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Final

import attrs
import pytest
import trio

from tests.e2e import moving, traffic
from tests.testbed.guest import boot, start
from tests.testbed.machine import Machine, vfio_user_pci
from tests.testbed.server_process import serve

if TYPE_CHECKING:
    from pathlib import Path

    from tests.testbed.bed import Bed
    from tests.testbed.guest import Guest
    from tests.testbed.netns import Netns

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

MACHINE: Final = Machine(programs=("ip",), memory_mib=128, modules=("virtio_net", "bonding"))
BOND: Final = """
cd /sys/class/net/bond0/bonding
pci=/sys/bus/pci/devices
echo active-backup >mode
echo 100 >miimon
echo ours >primary
for one in $pci/0000:01:00.0/virtio*/net/*; do
    [ -e $one/master ] || ip link set ${one##*/} name pair
done
echo +pair >slaves
(while usleep 50000; do
    for one in $pci/0000:02:00.0/virtio*/net/*; do
        [ ! -e $one ] || [ -e $one/master ] && continue
        ip link set ${one##*/} name ours
        echo +ours >slaves
    done
done) </dev/null >/dev/null 2>&1 &
"""
"""`pair` is net_failover's, over the standby, which is on bus 1; ours, on bus 2, comes and goes."""
CHANGES: Final = 6
"""From one device to the other, each with a gap: two of a move, and as many of one given up."""
ACTIVE: Final = "/sys/class/net/bond0/bonding/active_slave"


@attrs.frozen
class End:
    """A QEMU with the pair; `incoming` is where it waits for a guest."""

    guest: Guest
    incoming: Path


async def wait_active(guest: Guest, device: str) -> None:
    """Until that device carries the packets."""
    await guest.run(f'until [ "$(cat {ACTIVE})" = {device} ]; do usleep 20000; done')


class Pairs:
    """Makes ends."""

    def __init__(self, bed: Bed, netns: Netns, folder: Path, stack: AsyncExitStack) -> None:
        self._bed = bed
        self._netns = netns
        self._folder = folder
        self._stack = stack
        self._count = 0

    async def end(self, *, incoming: bool) -> End:
        self._count += 1
        folder = self._folder / f"end{self._count}"
        folder.mkdir()
        ours, standby = f"ours{self._count}", f"standby{self._count}"
        for tap in (ours, standby):
            await self._netns.add_tap(tap, master=moving.ONLY.bridge)
        socket, arrival = folder / "vf.sock", folder / "arrival"
        served = ("--socket-path", str(socket), "--mac", traffic.MAC, "--uplink", f"tap:{ours}")
        await self._stack.enter_async_context(serve(folder, *served, wrap=self._netns.wrap))
        net = f"tap,id=net,ifname={standby},script=no,downscript=no"
        device = f"virtio-net-pci,id=standby,failover=on,netdev=net,bus=port2,mac={traffic.MAC}"
        words = ["-netdev", net, "-device", "pcie-root-port,id=port2,slot=2,chassis=2"]
        words += ["-device", device, *vfio_user_pci(socket, failover_pair_id="standby")]
        words += ["-incoming", f"unix:{arrival}"] * incoming
        machine = attrs.evolve(MACHINE, devices=tuple(words))
        begin = start if incoming else boot
        entered = begin(self._bed, machine, folder, self._netns.wrap)
        return End(await self._stack.enter_async_context(entered), arrival)


async def migrate(source: End, target: End, wanted: str) -> None:
    """By QEMU alone, until the migration is in that state."""
    await source.guest.qmp.execute("migrate", uri=f"unix:{target.incoming}")
    await wait_migration(source, wanted)


async def wait_migration(source: End, wanted: str) -> None:
    with trio.fail_after(60):
        while True:
            said = await source.guest.qmp.execute("query-migrate")
            assert isinstance(said, dict)
            if said["status"] == wanted:
                return
            assert said["status"] not in ("completed", "failed"), said
            await trio.sleep(0.05)


async def events(guest: Guest) -> set[str]:
    """Of failover, those that have come since the last look; some come twice."""
    await guest.qmp.execute("query-status")
    names = {str(event["event"]) for event in guest.qmp.events}
    guest.qmp.events.clear()
    return names & {"FAILOVER_NEGOTIATED", "UNPLUG_PRIMARY"}


async def test_a_guest_moves_with_its_pair(bed: Bed, netns: Netns, tmp_path: Path) -> None:
    """A migration that is given up, and then there and back; the guest's TCP streams are whole."""
    async with AsyncExitStack() as stack:
        await moving.add_bridge(netns, moving.ONLY.bridge, moving.ONLY.host)
        pairs = Pairs(bed, netns, tmp_path, stack)
        here = await pairs.end(incoming=False)
        await here.guest.run(BOND)
        await traffic.configure(here.guest, "bond0")
        await wait_active(here.guest, "ours")
        assert await events(here.guest) == {"FAILOVER_NEGOTIATED"}
        passing = await stack.enter_async_context(moving.running_traffic(netns, here.guest))

        await set_bandwidth(here.guest, 1 << 20)
        await migrate(here, await pairs.end(incoming=True), "active")
        assert await events(here.guest) == {"UNPLUG_PRIMARY"}
        await wait_active(here.guest, "pair")
        await passing.pass_more(2)
        await here.guest.qmp.execute("migrate_cancel")
        await wait_migration(here, "cancelled")
        await wait_active(here.guest, "ours")
        await passing.pass_more(2)
        await set_bandwidth(here.guest, 1 << 30)

        for _ in range(2):
            there = await pairs.end(incoming=True)
            await migrate(here, there, "completed")
            assert await events(here.guest) == {"UNPLUG_PRIMARY"}
            assert await events(there.guest) == {"FAILOVER_NEGOTIATED"}
            await here.guest.quit()
            assert here.guest.process.returncode == 0
            await wait_active(there.guest, "ours")
            await passing.pass_more(2)
            here = there
        await passing.check(here.guest, moves=CHANGES)
        assert await here.guest.kernel_complaints() == []
        said = await here.guest.run("dmesg")
        assert "failover standby slave" in said
        assert "failover primary slave" not in said, "no virtio-net is one, for net_failover"


async def set_bandwidth(guest: Guest, rate: int) -> None:
    """Of migrations, in bytes a second: so slow that it cannot be over, or not."""
    await guest.qmp.execute("migrate-set-parameters", **{"max-bandwidth": rate})
