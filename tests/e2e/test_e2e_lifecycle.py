"""Drivers that come and go, resets, guests that reboot and clients that are killed."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import attrs
import pytest
import trio

from tests.e2e import traffic
from tests.e2e.served import SLOT_1, TAP_MACHINE, boot_on, guest_on_tap, serve_on_tap

if TYPE_CHECKING:
    from pathlib import Path

    from tests.testbed.bed import Bed
    from tests.testbed.guest import Guest
    from tests.testbed.netns import Netns
    from tests.testbed.server_process import ServerProcess

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

DRIVER = "/sys/bus/pci/drivers/virtio-pci"
DEVICE = f"/sys/bus/pci/devices/{SLOT_1}"
REBINDS = 20
KILLS = 20
WARM = 5
"""Kills after which the server holds what it keeps for good: caches, allocator arenas."""

RSS_SLACK_KIB = 512
"""An allocator's noise; one leaked guest mapping table or session would be more over 15 kills."""


async def test_driver_unbinds_and_binds(bed: Bed, netns: Netns, tmp_path: Path) -> None:
    async with guest_on_tap(bed, netns, tmp_path) as guest:
        for _ in range(REBINDS):
            await guest.run(f"echo {SLOT_1} >{DRIVER}/unbind && echo {SLOT_1} >{DRIVER}/bind")
            await traffic.configure(guest)
            await guest.run(f"ping -c 1 -W 5 {traffic.HOST}")
        await traffic.check_tcp(guest, netns)


async def test_resets_of_the_function(bed: Bed, netns: Netns, tmp_path: Path) -> None:
    """By FLR, by D3hot and by the bus above, each without a driver and under one.

    virtio_net does not restore itself after a reset (nor does it on QEMU's own device), so that a
    new driver follows each.
    """
    async with guest_on_tap(bed, netns, tmp_path) as guest:
        methods = (await guest.run(f"cat {DEVICE}/reset_method")).split()
        assert methods == ["flr", "pm", "bus"]
        for method in methods:
            await guest.run(f"echo {method} >{DEVICE}/reset_method")
            for script in (
                f"echo {SLOT_1} >{DRIVER}/unbind; echo 1 >{DEVICE}/reset",
                f"echo 1 >{DEVICE}/reset; echo {SLOT_1} >{DRIVER}/unbind",
            ):
                await guest.run(f"{script}; echo {SLOT_1} >{DRIVER}/bind")
                await traffic.configure(guest)
                await traffic.check_ping(guest, netns)
        await traffic.check_tcp(guest, netns)


async def test_guest_is_reset_as_a_whole(bed: Bed, netns: Netns, tmp_path: Path) -> None:
    """By its own reboot, by the machine's reset button; then stopped and continued."""
    machine = attrs.evolve(TAP_MACHINE, restartable=True)
    async with guest_on_tap(bed, netns, tmp_path, machine=machine) as guest:
        await traffic.check_ping(guest, netns)
        await guest.reboot()
        await traffic.configure(guest)
        await traffic.check_ping(guest, netns)
        await guest.qmp.execute("system_reset")
        await guest.wait_boot(3)
        await traffic.configure(guest)
        await guest.qmp.execute("stop")
        await guest.qmp.execute("cont")
        await traffic.check_ping(guest, netns)
        await traffic.check_tcp(guest, netns)


async def test_client_is_killed_under_traffic(bed: Bed, netns: Netns, tmp_path: Path) -> None:
    """A new QEMU on the same socket gets a working device, and the server keeps nothing."""
    async with (
        serve_on_tap(netns, tmp_path) as server,
        await netns.listen(traffic.PORT) as listener,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(trio.serve_listeners, _flood, [listener])
        started = server.usage()
        after = []
        for kill in range(KILLS):
            async with boot_on(bed, TAP_MACHINE, tmp_path / str(kill), tmp_path / "vf.sock") as vm:
                await traffic.configure(vm)
                await _start_flood(vm)
                await vm.kill()
            await _settle(server, started.fds)
            after.append(server.usage())
        nursery.cancel_scope.cancel()
    warm, last = after[WARM - 1], after[-1]
    assert (last.fds, last.threads) == (warm.fds, warm.threads), after
    assert warm.fds <= started.fds, "a session's descriptors are open after its end"
    assert last.maps <= warm.maps, after
    assert last.rss_kib <= warm.rss_kib + RSS_SLACK_KIB, after


async def _flood(stream: trio.SocketStream) -> None:
    """Both ways as fast as it goes, until the guest is no more."""

    async def send() -> None:
        while True:
            await stream.send_all(bytes(65536))

    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            while await stream.receive_some():
                pass
            nursery.cancel_scope.cancel()
    except* trio.BrokenResourceError as group:
        error = group.exceptions[0].__cause__
        if not isinstance(error, OSError) or error.errno not in (errno.ECONNRESET, errno.EPIPE):
            raise


async def _start_flood(guest: Guest) -> None:
    """Returns when a mebibyte has gone each way, with more behind it."""
    await guest.run(f"nc {traffic.HOST} {traffic.PORT} </dev/zero >/dev/null 2>&1 &")
    with trio.fail_after(30):
        for name in ("rx_bytes", "tx_bytes"):
            while await traffic.counter(guest, name) < 1 << 20:
                pass


async def _settle(server: ServerProcess, fds: int) -> None:
    """Until the server has seen its client's end: it holds `fds` descriptors at most."""
    with trio.move_on_after(5):
        while server.usage().fds > fds:  # noqa: ASYNC110  /proc tells no event
            await trio.sleep(0.02)


async def test_server_ends_in_order(netns: Netns, tmp_path: Path) -> None:
    async with serve_on_tap(netns, tmp_path) as server:
        assert (tmp_path / "vf.sock").is_socket()
        assert await server.stop() == 0
        assert not (tmp_path / "vf.sock").exists()
