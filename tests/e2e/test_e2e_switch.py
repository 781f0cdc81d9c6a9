"""Several members: two guests that talk through the switch, two devices in one guest."""

from __future__ import annotations

import json
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import attrs
import pytest
import trio

from tests.e2e import hostile, traffic
from tests.e2e.served import TAP_MACHINE, boot_on
from tests.testbed.server_process import serve

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tests.testbed.bed import Bed
    from tests.testbed.guest import Guest
    from tests.testbed.netns import Netns

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

MACHINE = attrs.evolve(TAP_MACHINE, modules=("virtio_net", "8021q"))
ATTACKS = 200
LEFT = "10.0.0.11"
RIGHT = "10.0.0.12"
LEFT_VLAN = "10.0.5.11"
RIGHT_VLAN = "10.0.5.12"


@asynccontextmanager
async def two_guests(bed: Bed, folder: Path) -> AsyncIterator[tuple[Guest, Guest]]:
    """On two members of one owner, whose switch is wired to nothing else."""
    config = folder / "two.toml"
    members = "".join(
        f'[[owner.member]]\nname = "{name}"\nsocket_path = "{folder / name}.sock"\n'
        for name in ("left", "right")
    )
    config.write_text(f"[[owner]]\n{members}")
    async with (
        serve(folder, "--config", str(config)),
        boot_on(bed, MACHINE, folder / "left", folder / "left.sock") as left,
        boot_on(bed, MACHINE, folder / "right", folder / "right.sock") as right,
    ):
        await traffic.configure(left, address=LEFT)
        await traffic.configure(right, address=RIGHT)
        await right.run("iperf3 -s -D && until grep -q :1451 /proc/net/tcp6; do :; done")
        yield left, right
        assert await right.kernel_complaints() == []


async def test_two_guests_talk_through_the_switch(bed: Bed, tmp_path: Path) -> None:
    """Untagged, then in a VLAN of the guests' own."""
    async with two_guests(bed, tmp_path) as (left, right):
        await left.run(f"ping -c 3 -i 0.2 -W 5 {RIGHT}")
        await right.run(f"ping -c 3 -i 0.2 -W 5 -s 8000 {LEFT}")
        await check_tcp(left, RIGHT)
        for guest, address in ((left, LEFT_VLAN), (right, RIGHT_VLAN)):
            await guest.run("ip link add link eth0 name eth0.5 type vlan id 5")
            await traffic.configure(guest, "eth0.5", address)
        await left.run(f"ping -c 3 -i 0.2 -W 5 {RIGHT_VLAN}")
        await check_tcp(left, RIGHT_VLAN)


async def check_tcp(client: Guest, address: str) -> None:
    """Both ways between two guests, one of which serves iperf3 at `address`."""
    for direction in ("", "-R"):
        report = json.loads(await client.run(f"iperf3 -c {address} -n 16M -J {direction}", 60))
        assert report.get("error") is None, report
        assert report["end"]["sum_received"]["bytes"] >= 15 << 20


async def test_one_guest_dies_and_the_other_does_not_notice(bed: Bed, tmp_path: Path) -> None:
    async with two_guests(bed, tmp_path) as (left, right):
        await left.run(f"iperf3 -c {RIGHT} -t 60 >/dev/null 2>&1 &")
        with trio.fail_after(30):
            while await traffic.counter(right, "rx_bytes") < 1 << 20:
                pass
        await left.kill()
        await right.run("ip link show eth0 | grep -q LOWER_UP")
        async with boot_on(bed, MACHINE, tmp_path / "again", tmp_path / "left.sock") as again:
            await traffic.configure(again, address=LEFT)
            await again.run(f"ping -c 3 -i 0.2 -W 5 {RIGHT}")


async def test_two_devices_in_one_guest(bed: Bed, netns: Netns, tmp_path: Path) -> None:
    """Of two owners of one server, each wired to a TAP of its own."""
    macs = ("52:54:00:00:00:0a", "52:54:00:00:00:0b")
    owners = ""
    for number, mac in enumerate(macs):
        await netns.add_tap(f"tap{number}", f"10.0.{number}.1/24")
        owners += (
            f'[[owner]]\nuplink = "tap:tap{number}"\n'
            f'[[owner.member]]\nmac = "{mac}"\nsocket_path = "{tmp_path}/{number}.sock"\n'
        )
    config = tmp_path / "owners.toml"
    config.write_text(owners)
    async with (
        serve(tmp_path, "--config", str(config), wrap=netns.wrap),
        boot_on(bed, TAP_MACHINE, tmp_path, tmp_path / "0.sock", tmp_path / "1.sock") as guest,
    ):
        for number, mac in enumerate(macs):
            assert mac in await guest.run(f"cat /sys/class/net/eth{number}/address")
            await traffic.configure(guest, f"eth{number}", f"10.0.{number}.2")
        async with trio.open_nursery() as nursery:
            for number in range(len(macs)):
                nursery.start_soon(guest.run, f"ping -c 5 -i 0.2 -W 5 10.0.{number}.1")
                host = ("ping", "-c", "5", "-i", "0.2", "-W", "5", f"10.0.{number}.2")
                nursery.start_soon(netns.run, *host)
        await traffic.check_tcp(guest, netns, host="10.0.0.1")
        await traffic.check_tcp(guest, netns, host="10.0.1.1")
        assert await guest.kernel_complaints() == []


async def test_a_hostile_client_next_door(bed: Bed, netns: Netns, tmp_path: Path) -> None:
    """A guest's traffic goes on while another member's socket is fed what no client sends."""
    await traffic.add_tap(netns)
    config = tmp_path / "doors.toml"
    config.write_text(
        f'[[owner]]\nuplink = "tap:{traffic.TAP}"\n'
        f'[[owner.member]]\nmac = "{traffic.MAC}"\nsocket_path = "{tmp_path}/good.sock"\n'
        f'[[owner.member]]\nsocket_path = "{tmp_path}/bad.sock"\n'
    )
    async with (
        serve(tmp_path, "--config", str(config), wrap=netns.wrap) as server,
        boot_on(bed, TAP_MACHINE, tmp_path, tmp_path / "good.sock") as guest,
    ):
        await traffic.configure(guest)
        await traffic.check_ping(guest, netns)
        quiet = server.usage()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(traffic.check_integrity, guest, netns)
            nursery.start_soon(guest.run, f"ping -c 20 -i 0.2 -W 5 {traffic.HOST}")
            for seed in range(ATTACKS):
                await hostile.attack(tmp_path / "bad.sock", seed)
        await traffic.check_tcp(guest, netns)
        after = server.usage()
        assert (after.fds, after.threads) == (quiet.fds, quiet.threads), (quiet, after)
        async with boot_on(bed, TAP_MACHINE, tmp_path / "new", tmp_path / "bad.sock") as newcomer:
            await traffic.configure(newcomer, address=RIGHT)
            await newcomer.run(f"ping -c 2 -W 5 {traffic.HOST}")
            await newcomer.run(f"ping -c 2 -W 5 {traffic.GUEST}")
