"""Uplinks other than a TAP, each against the real peer: QEMU's own netdevs, and passt."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
import trio

from tests.e2e import traffic
from tests.e2e.served import TAP_MACHINE, boot_on
from tests.testbed.guest import boot
from tests.testbed.machine import Machine
from tests.testbed.server_process import serve

if TYPE_CHECKING:
    from pathlib import Path

    from tests.testbed.bed import Bed
    from tests.testbed.netns import Netns

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

GATEWAY = "10.0.0.254"


async def test_sockets_of_qemu(bed: Bed, tmp_path: Path) -> None:
    """Datagrams and streams, either side listening, to a guest on QEMU's own devices."""
    netdevs = (
        "dgram,local.type=unix,local.path={0}/b.dgram,remote.type=unix,remote.path={0}/a.dgram",
        "stream,server=off,addr.type=unix,addr.path={0}/ours.stream,reconnect-ms=100",
        "stream,server=on,addr.type=unix,addr.path={0}/theirs.stream",
    )
    uplinks = (
        "datagram:{0}/a.dgram,{0}/b.dgram",
        "stream-listen:{0}/ours.stream",
        "stream:{0}/theirs.stream",
    )
    peer_devices = [
        word
        for number, netdev in enumerate(netdevs)
        for word in (
            *("-netdev", f"{netdev.format(tmp_path)},id=net{number}"),
            *("-device", f"virtio-net-pci,netdev=net{number},mac=52:54:00:00:00:1{number}"),
        )
    ]
    sockets = [tmp_path / f"{number}.sock" for number in range(len(uplinks))]
    config = tmp_path / "uplinks.toml"
    config.write_text(
        "".join(
            f'[[owner]]\nuplink = "{uplink.format(tmp_path)}"\n'
            f'[[owner.member]]\nsocket_path = "{socket}"\n'
            for uplink, socket in zip(uplinks, sockets, strict=True)
        )
    )
    async with (
        serve(tmp_path, "--config", str(config)),
        boot(bed, Machine(devices=tuple(peer_devices)), tmp_path / "peer") as peer,
        boot_on(bed, TAP_MACHINE, tmp_path / "guest", *sockets) as guest,
    ):
        for number, uplink in enumerate(uplinks):
            await traffic.configure(guest, f"eth{number}", f"10.0.{number}.2")
            await traffic.configure(peer, f"eth{number}", f"10.0.{number}.1")
            for size in (56, 8000):
                answer = await guest.execute(f"ping -c 3 -i 0.2 -W 5 -s {size} 10.0.{number}.1")
                assert answer.code == 0, f"{uplink}: {answer.output}"
        assert await guest.kernel_complaints() == []


async def test_tap_by_descriptor(bed: Bed, netns: Netns, tmp_path: Path) -> None:
    """The server is outside the namespace and knows the TAP only as what it was handed."""
    await traffic.add_tap(netns)
    tap = await netns.open_tap(traffic.TAP)
    options = ("--socket-path", str(tmp_path / "vf.sock"), "--uplink", f"tap-fd:{tap}")
    try:
        async with (
            serve(tmp_path, *options, pass_fds=(tap,)),
            boot_on(bed, TAP_MACHINE, tmp_path, tmp_path / "vf.sock") as guest,
        ):
            await traffic.configure(guest)
            await traffic.check_ping(guest, netns)
            await traffic.check_tcp(guest, netns)
    finally:
        os.close(tap)


async def test_passt(
    bed: Bed, netns: Netns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Addresses by its DHCP, and TCP to the host by way of its gateway address."""
    await traffic.add_tap(netns)
    await netns.run("ip", "route", "add", "default", "via", GATEWAY)
    options = ("--socket-path", str(tmp_path / "vf.sock"), "--uplink", "passt")
    received = b""
    async with (
        serve(tmp_path, *options, wrap=netns.wrap),
        boot_on(bed, TAP_MACHINE, tmp_path, tmp_path / "vf.sock") as guest,
        await netns.listen(traffic.PORT) as listener,
        trio.open_nursery() as nursery,
    ):
        await guest.run("ip link set eth0 up")
        lease = await guest.run("udhcpc -i eth0 -n -q -f -s /bin/true 2>&1")
        assert f"lease of {traffic.HOST} obtained" in lease
        await traffic.configure(guest, address=traffic.HOST)
        nursery.start_soon(guest.run, f"head -c 1000000 /dev/zero | nc {GATEWAY} {traffic.PORT}")
        async with await listener.accept() as stream:
            while len(received) < 1_000_000:
                data = await stream.receive_some()
                assert data, f"the connection ended after {len(received)} bytes"
                received += data
    assert received == bytes(1_000_000)
