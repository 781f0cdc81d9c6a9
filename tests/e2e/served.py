"""Guests on devices that the real server serves, put together for a test."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final

import attrs

from tests.e2e import traffic
from tests.testbed.guest import boot
from tests.testbed.machine import Machine, vfio_user_pci
from tests.testbed.server_process import serve

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tests.testbed.bed import Bed
    from tests.testbed.guest import Guest
    from tests.testbed.netns import Netns
    from tests.testbed.server_process import ServerProcess

SLOT_1: Final = "0000:01:00.0"
"""Where the guest sees the device behind the first root port."""

TAP_MACHINE: Final = Machine(programs=traffic.PROGRAMS)


@asynccontextmanager
async def serve_on_tap(
    netns: Netns, folder: Path, *options: str, mtu: int = 1500
) -> AsyncIterator[ServerProcess]:
    """A server with one member, its socket `folder/vf.sock`, whose uplink is the test's TAP."""
    await traffic.add_tap(netns, mtu)
    device = ("--socket-path", str(folder / "vf.sock"), "--mac", traffic.MAC)
    uplink = ("--uplink", f"tap:{traffic.TAP}")
    async with serve(folder, *device, *uplink, *options, wrap=netns.wrap) as server:
        yield server


@asynccontextmanager
async def boot_on(bed: Bed, machine: Machine, folder: Path, *sockets: Path) -> AsyncIterator[Guest]:
    """A guest with a device behind each socket, in this order from slot 1."""
    devices = [
        word
        for slot, socket in enumerate(sockets, 1)
        for word in vfio_user_pci(socket, slot=slot, ident=f"vf{slot}")
    ]
    machine = attrs.evolve(machine, devices=(*machine.devices, *devices))
    async with boot(bed, machine, folder) as guest:
        yield guest


@asynccontextmanager
async def guest_on_tap(
    bed: Bed,
    netns: Netns,
    folder: Path,
    *options: str,
    machine: Machine = TAP_MACHINE,
    mtu: int = 1500,
) -> AsyncIterator[Guest]:
    """A guest whose only device is served and wired to the test's TAP, configured and up.

    At the end the guest's kernel must have nothing to complain of.
    """
    async with (
        serve_on_tap(netns, folder, *options, mtu=mtu),
        boot_on(bed, machine, folder, folder / "vf.sock") as guest,
    ):
        await traffic.configure(guest)
        yield guest
        assert await guest.kernel_complaints() == []
