"""Served members with a control interface each, and a live guest that is moved by that alone.

`ControlledServer` is a server in this process: a member, its listener, and a control socket.
`move` is what an orchestrator does beside two QEMUs that know nothing of it: both clients hold
their sessions throughout and send no migration command.
"""

from __future__ import annotations

import contextlib
import socket
from typing import TYPE_CHECKING

import attrs
import trio

from tests.backends.member_rig import MAC_A, MAC_B
from tests.migration.guest_move_network import Host
from tests.migration.guest_move_rig import Rig, places
from tests.server.server_process import short_folder
from vfio_user_virtio.backends.software.config import MemberConfig
from vfio_user_virtio.backends.software.migratable import migratable_members
from vfio_user_virtio.backends.software.owner import Owner
from vfio_user_virtio.backends.software.uplinks.datagram import DatagramUplink
from vfio_user_virtio.control.client import ControlClient, connect_control
from vfio_user_virtio.control.connections import serve_control
from vfio_user_virtio.control.device_control import DeviceControl
from vfio_user_virtio.control.service import ControlService
from vfio_user_virtio.limits import PAGE_SIZE
from vfio_user_virtio.testing.loopback import ungrouped_nursery
from vfio_user_virtio.testing.virtio_pci import CAP_MSIX, COMMAND, VirtioPci
from vfio_user_virtio.transport.listener import serve_listener

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from vfio_user_virtio.backends.software.member import Member
    from vfio_user_virtio.testing.guest_move import Place


@attrs.define
class ControlledServer:
    """Its `member` is the device ``vm``; `folder` has NAME.sock and NAME.control."""

    name: str
    folder: Path
    member: Member
    service: ControlService

    @property
    def path(self) -> str:
        return str(self.folder / f"{self.name}.control")

    def control(self) -> contextlib.AbstractAsyncContextManager[ControlClient]:
        """A connection of its own."""
        return connect_control(self.path)


async def serve(
    nursery: trio.Nursery, host: Host, folder: Path, name: str, config: MemberConfig
) -> ControlledServer:
    """A server that runs in `nursery`."""
    owner = Owner(name)
    member = owner.add_member(config)
    owner.add_uplink(DatagramUplink(owner.switch, local=host.address_of(name), remote=host.address))
    (device,) = (await migratable_members(owner)).values()
    controlled = DeviceControl("vm", device, kind="software", identity=config.mac.hex(":"))
    service = ControlService([controlled])
    listener, control = (_listening(folder / f"{name}.{kind}") for kind in ("sock", "control"))

    async def run() -> None:
        with listener, control:
            async with trio.open_nursery() as running:
                running.start_soon(owner.run)
                running.start_soon(serve_control, control, service)
                await serve_listener(
                    listener, device, name=name, on_session=controlled.session_began
                )

    nursery.start_soon(run)
    return ControlledServer(name, folder, member, service)


def _listening(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()
    return listener


@contextlib.asynccontextmanager
async def controlled_rig(
    *,
    member: dict[str, object] | None = None,
    target: dict[str, object] | None = None,
    remote: bool = False,
    ram_size: int = 8 << 20,
    **driver: object,
) -> AsyncIterator[tuple[Rig, dict[str, ControlledServer]]]:
    """A guest on server a that can move to b, and both servers; not started."""
    with short_folder() as folder, Host(folder) as host:
        async with ungrouped_nursery() as nursery:
            servers = {}
            for name, mac in zip("ab", (MAC_A, MAC_B), strict=True):
                given = (member or {}) | ((target or {}) if name == "b" else {})
                config = MemberConfig(mac=mac, **given)  # type: ignore[arg-type]  # passed on
                servers[name] = await serve(nursery, host, folder, name, config)
            async with places(
                host, folder, ram_size, {"remote": remote}, driver, twin=remote
            ) as made:
                made.members = {name: server.member for name, server in servers.items()}
                yield made, servers
            nursery.cancel_scope.cancel()


@attrs.define
class Moved:
    """What a move had to do."""

    image: int = 0
    pages: int = 0


async def move(made: Rig, source: ControlClient, target: ControlClient) -> Moved:
    """Move the guest to the other place; see the module head.  The source is left in STOP."""
    guest, here, there = made.guest, made.guest.place, made.places[made.there]
    moved = Moved()
    await source.start_dirty_log("vm")
    guest.ram.copy_to(there.memory, range(guest.ram.size // PAGE_SIZE))
    await source.set_migration_state("vm", "PRE_COPY")
    await target.set_migration_state("vm", "RESUMING")
    await target.write_image("vm", await source.read_image("vm"))

    await guest.client.pause()  # stop, of QMP
    await source.set_migration_state("vm", "STOP_COPY")
    image = await source.read_image("vm")
    await source.set_migration_state("vm", "STOP")
    await target.write_image("vm", image)
    moved.image = len(image)
    guest.ram.copy_to(there.memory)  # QEMU's own last pass: what the guest has written
    await set_up(guest.pci, here, there)
    ranges = await source.report_dirty_log("vm")
    moved.pages = await source.copy_memory("vm", ranges, target, "vm") // PAGE_SIZE
    assert guest.ram.difference(there.memory) == [], "a page was written and not told"
    guest.ram.move_into(there.memory)

    await target.resume("vm")
    guest.place = there
    guest.client.go_on(there.client)  # cont, of QMP
    await guest.pci.disarm(here.client)
    await source.stop_dirty_log("vm")
    return moved


async def set_up(pci: VirtioPci, here: Place, there: Place) -> None:
    """What QEMU's own vfio code does when PCI state is restored through it."""
    old = VirtioPci(here.client, pci.pci_capabilities, pci.capabilities)
    new = await VirtioPci.open(there.client)
    await new.config_write(COMMAND, await old.config_read(COMMAND, 2), 2)
    if CAP_MSIX in pci.pci_capabilities:
        control = pci.pci_capabilities[CAP_MSIX] + 2
        await new.config_write(control, await old.config_read(control, 2), 2)
    await pci.arm(there.client)
