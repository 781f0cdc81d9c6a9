"""A guest, its driver, its clients, its owner and its peer, and what must hold between two steps of
theirs, whatever the steps are and in whatever order (`test_migration_model`).

The guest is on the member `here` and can be moved to `there`; both have the same guest memory, but
only that of `here` is mapped.  `peer` is whom it talks to, on a member that is never migrated, and
`STRANGER` one more member, for which others make objects.

What must hold (`World.check`):

* the state that a client is told is the state that its member has: stopped or not, with an object
  of the right kind or without
* the owner has those objects, and of ours no other, unless a command on one came to nothing
* a member that is not stopped has sent and answered all that its driver asked for, with an
  interrupt, and has just the state that the driver has set; one that is stopped wrote no memory
* what the guest sent came to its peer once and in order, when and only when it was given back; what
  the switch gave to the guest came once and in order
* what the device wrote while that was logged is in the next report
* nothing but ClientError has come out of a device
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import attrs
import trio

from tests.backends.dirty_rig import PAGE, WatchedRam, bits
from tests.backends.member_rig import MAC_A, MAC_B, MAC_C, configs
from tests.migration.model_rig import (
    Connection,
    DirectClient,
    EagerDriver,
    Loop,
    Place,
    SlowMemory,
    UnreliableQueue,
    number_of,
    numbered,
)
from vfio_user_virtio.backends.software.administration import Administration
from vfio_user_virtio.backends.software.owner import Owner
from vfio_user_virtio.device import (
    FeatureOperation,
    IrqAction,
    IrqRequest,
    LoggingReport,
    LoggingStart,
    VfioIrq,
)
from vfio_user_virtio.errors import ClientError
from vfio_user_virtio.migration.admin_client import AdminClient
from vfio_user_virtio.migration.member_migration import MemberMigration
from vfio_user_virtio.migration.migratable_device import MigratableDevice
from vfio_user_virtio.migration.parts_owner import PartsOwner
from vfio_user_virtio.migration.states import SAVING
from vfio_user_virtio.protocol.dma_logging import (
    encode_logging_report_request,
    encode_logging_start,
)
from vfio_user_virtio.protocol.feature import Feature
from vfio_user_virtio.protocol.migration import MigrationFlags, MigrationState
from vfio_user_virtio.testing.virtio_pci import CAP_MSIX, MSIX_ENABLE, VirtioPci
from vfio_user_virtio.virtio import admin_commands as commands
from vfio_user_virtio.virtio.admin import STATUS_SIZE, encode_command
from vfio_user_virtio.virtio.admin_commands import ObjectKind
from vfio_user_virtio.virtio.common_config import Status
from vfio_user_virtio.virtio.features import Feature as NetFeature
from vfio_user_virtio.virtio.net_control import GUEST_OFFLOADS, NetState, execute_untrusted
from vfio_user_virtio.virtio.rx_filter import FilterState
from vfio_user_virtio.virtio.split_queue import ring_layout

if TYPE_CHECKING:
    from tests.migration.model_rig import Fault
    from vfio_user_virtio.backends.software.member import Member

ERROR, STOP, RUNNING, STOP_COPY, RESUMING, RUNNING_P2P, PRE_COPY, PRE_COPY_P2P = MigrationState
PAIRS: Final = 2
OBJECTS: Final = 3
STRANGER: Final = 4
RAM_SIZE: Final = 1 << 20


class World:
    """See the module head.  `remote`: the device reaches guest memory by messages."""

    def __init__(self, options: MigrationFlags, features: int, *, remote: bool) -> None:
        self.loop = Loop()
        self.options = options
        self.remote = remote
        self.owner = Owner("owner")
        macs = (MAC_A, MAC_B, MAC_C, bytes.fromhex("020000000004"))
        members = [self.owner.add_member(config) for config in configs(*macs, queue_pairs=PAIRS)]
        self.administration = Administration(self.owner, get_objects=OBJECTS, set_objects=OBJECTS)
        self.queue = UnreliableQueue(self.administration)
        self.parts_owner = PartsOwner(AdminClient(self.queue))
        self.ram = WatchedRam(RAM_SIZE)
        self.memory = SlowMemory(self.ram)
        self.peer_ram = WatchedRam(RAM_SIZE)
        self.strangers: set[int] = set()
        self.disturbed = False
        """Whether the owner has ever failed, or others have taken ids."""
        try:
            self.loop.call(self._build, members, features)
        except BaseException:
            self.loop.close()
            raise

    async def _build(self, members: list[Member], features: int) -> None:
        self.loop.nursery.start_soon(self.owner.run)
        support = await self.parts_owner.discover()
        assert support.lack is None
        self.here = await self._place(members[0], self.memory)
        self.there = await self._place(members[2], self.memory)
        self._peer = await self._place(members[1], SlowMemory(self.peer_ram))
        await self.peer_ram.map(self._peer.client)
        self.peer = EagerDriver(
            self._peer.pci, self.peer_ram, queue_size=64, rx_buffers=64, rx_buffer_size=2048
        )
        await self.peer.start()
        await self.map()
        self.driver = EagerDriver(
            self.here.pci,
            self.ram,
            features=features,
            max_pairs=PAIRS,
            queue_size=16,
            rx_buffers=8,
            rx_buffer_size=2048,
        )
        self.alive = False
        self.reference = NetState(FilterState(MAC_A))
        self.sent: list[list[int]] = [[] for _ in range(PAIRS)]
        """By pair, the numbers of frames that were put in the ring and not given back."""
        self.next_number = 0
        self.due: list[set[int]] = [set() for _ in range(PAIRS)]
        """Those that were given back, and have to come."""
        self.perhaps: set[int] = set()
        """Those that may come: the device was reset, or gave them to nobody in time."""
        self.came: list[list[int]] = [[] for _ in range(PAIRS)]
        self.from_peer: list[list[int]] = [[] for _ in range(PAIRS)]
        """By the pair that they came to: steering may move a flow from one to the other."""
        self.arrived = 0
        self.owed: set[int] = set()
        await self.start_driver()

    async def _place(self, member: Member, memory: SlowMemory) -> Place:
        migration = MemberMigration(
            self.parts_owner,
            member.config.member_id,
            name=member.name,
            clock=trio.current_time,
            options=self.options,
            private=member.mode,
        )
        device = MigratableDevice(member, migration, member.logging)
        client = DirectClient(device)
        session = Connection(self.loop, device, memory)
        await self.rest()
        place = Place(member, device, client, await VirtioPci.open(client), session)
        started = member.mode.started

        def runs() -> None:
            place.was_stopped = False
            started()

        setattr(member.mode, "started", runs)  # noqa: B010 - mypy would not have it assigned
        return place

    def close(self) -> None:
        try:
            self.loop.call(self._end)
        finally:
            self.loop.close()
            self.ram.close()
            self.peer_ram.close()

    async def _end(self) -> None:
        """The owner has failed for the last time: members run on, and then nothing is left."""
        self.queue.disarm()
        self.memory.delay = 0.0
        await self.others_are_done()
        for place in (self.here, self.there):
            if place.migration.state not in (ERROR, RESUMING):
                await place.client.set_state(RUNNING)
        await self.check()
        for place in (self.here, self.there, self._peer):
            await place.session.end()
            place.pci.close()
            assert not place.member.mode.stopped
        if self.parts_owner._lost:
            await self.parts_owner.destroy(1, await self.parts_owner.create(1, ObjectKind.GET))
        assert not self.parts_owner.objects_in_use
        assert not self.administration.objects

    # --- the owner -----------------------------------------------------------------------------

    def arm(self, fault: Fault, left: int) -> None:
        self.disturbed = True
        self.queue.arm(fault, left)

    async def others_make_objects(self, first: int, count: int, kind: ObjectKind) -> None:
        self.disturbed = True
        for number in range(first, first + count):
            command = encode_command(commands.object_create(STRANGER, number, kind))
            if not any(await self.administration.execute(command, STATUS_SIZE)):
                self.strangers.add(number)

    async def others_are_done(self) -> None:
        while self.strangers:
            command = encode_command(commands.object_destroy(STRANGER, self.strangers.pop()))
            assert not any(await self.administration.execute(command, STATUS_SIZE))

    async def rest(self) -> None:
        """Let happen what does by itself."""
        if self.memory.delay:
            await trio.sleep(1000)
        await trio.testing.wait_all_tasks_blocked()

    # --- the driver ----------------------------------------------------------------------------

    async def start_driver(self) -> None:
        await self.collect()
        self._forget_sent()
        self.alive = False
        await self.here.pci.set_up()
        await self.driver.start()
        self.alive = True
        features = self.driver.features
        self.reference = NetState(
            FilterState(self.here.member.config.mac),
            features=features,
            max_queue_pairs=PAIRS,
            guest_offloads=features & GUEST_OFFLOADS,
        )
        self.reference.filter.filter_vlans = bool(features & NetFeature.CTRL_VLAN.mask)

    def _forget_sent(self) -> None:
        for numbers in self.sent:
            self.perhaps.update(numbers)
            numbers.clear()

    async def send(self, pair: int, count: int) -> None:
        """Frames of the guest."""
        pair = min(pair, self.driver.pairs - 1)
        for _ in range(count):
            data = numbered(MAC_B, self.reference.filter.mac, pair, self.next_number)
            if await self.driver.put(data, pair):
                self.sent[pair].append(self.next_number)
                self.next_number += 1

    async def peer_sends(self, to: bytes | None, pair: int, count: int) -> None:
        """Frames for the guest, or for `to`; the last byte of a destination makes a flow."""
        for _ in range(count):
            data = numbered(to or self.reference.filter.mac, MAC_B, pair, self.next_number)
            if await self.peer.put(data, 0):
                self.next_number += 1

    async def collect(self, *, repost: bool = True) -> None:
        """What has come to both drivers."""
        self.peer.returned(0)
        for data in await self.peer.take(0, repost=True):
            found = number_of(data)
            if found is not None:
                self.came[found[0]].append(found[1])
        if not self.alive:
            return
        runs = self.here.mapped and not self.here.member.mode.stopped
        for port in self.driver._ports.values():
            assert not (runs and port.queue.used_waiting) or port.interrupt.poll(), "an interrupt"
        for pair in range(self.driver.pairs):
            for number in [self.sent[pair].pop(0) for _ in range(self.driver.returned(pair))]:
                self.due[pair].add(number)
            for data in await self.driver.take(pair, repost=repost):
                self.arrived += 1
                found = number_of(data)
                if found is not None:
                    self.from_peer[pair].append(found[1])
        if self.driver.has(NetFeature.CTRL_VQ):
            for command, ack in self.driver.answers():
                answer, _ = execute_untrusted(self.reference, command)
                assert answer == bytes((ack,)), "the device answers as it should"
        for port in self.driver._ports.values():
            port.interrupt.poll()
            port.queue.enable_interrupts()

    # --- memory and sessions -------------------------------------------------------------------

    async def map(self) -> None:
        await self.ram.map(self.here.client, remote=self.remote)
        self.here.mapped = True

    async def unmap(self) -> None:
        await self.ram.unmap(self.here.client)
        self.here.mapped = False

    async def plug(self, place: Place) -> None:
        """What the guest's machine restores beside the device: MSI-X, and its eventfds."""
        pci, before = place.pci, self.driver.pci
        control = pci.pci_capabilities[CAP_MSIX] + 2
        await pci.set_up()
        await pci.config_write(control, await pci.config_read(control, 2) | MSIX_ENABLE, 2)
        pci.features, pci._notify_off = before.features, before._notify_off
        if pci is not before:
            pci.close()
            pci._interrupts, before._interrupts = before._interrupts, []
        eventfds = tuple(interrupt.fd for interrupt in pci._interrupts)
        if eventfds:
            await place.client.set_irqs(
                IrqRequest(VfioIrq.MSIX, 0, len(eventfds), IrqAction.TRIGGER, eventfds=eventfds)
            )
        self.driver.pci = pci

    async def replace_client(self, place: Place) -> None:
        """The client is lost, and another one comes, of the same guest."""
        if place is self.here:
            await self.collect()
        await place.session.end()
        self.owed.clear()
        place.mapped = False
        place.session = Connection(self.loop, place.device, self.memory)
        await self.rest()
        if place is self.here:
            await self.plug(place)
            await self.map()
            if self.alive:
                for index in self.driver._ports:
                    await self.driver.kick(index)

    async def cancel(self, place: Place, state: MigrationState, seconds: float) -> None:
        """The client is lost while it waits, and another one comes."""
        try:
            with trio.move_on_after(seconds):
                await place.client.set_state(state)
        finally:
            await self.replace_client(place)

    async def migrate(self, *, traffic: int, piece: int, log: bool) -> None:
        """From `here` to `there`, with some traffic on the way; or up to where that fails."""
        source, target = self.here, self.there
        await target.client.reset()
        await source.client.set_state(RUNNING)
        await target.client.set_state(RESUMING)
        if log and not source.member.logging.active:
            await self.start_logging()
        if self.options & MigrationFlags.PRE_COPY:
            await source.client.set_state(PRE_COPY)
            await self._copy(source, target, piece)
        if self.alive:
            await self.send(traffic % PAIRS, traffic)
        await self.peer_sends(None, 0, traffic)
        await source.client.set_state(STOP_COPY)
        if source.member.logging.active:
            await self.report()
        await self._copy(source, target, piece)
        await target.client.set_state(STOP)
        logged = source.member.logging.active
        assert not (self.look() and logged), "written after the last report"
        self.owed.clear()
        await self.ram.map(target.client, remote=self.remote)
        await self.plug(target)
        try:
            await target.client.set_state(RUNNING)
        except ClientError:
            await self.ram.unmap(target.client)
            await self.plug(source)
            raise
        await self.unmap()
        self.here, self.there = target, source
        target.mapped = True
        await source.client.reset()

    async def _copy(self, source: Place, target: Place, piece: int) -> None:
        stream = await source.client.read_all(piece)
        for start in range(0, len(stream), piece):
            await target.device.migration_write(stream[start : start + piece])

    async def reset(self, place: Place) -> None:
        if place is self.here:
            await self.collect()
            self._forget_sent()
            self.alive = False
        await place.client.reset()

    async def function_level_reset(self) -> None:
        await self.collect()
        self._forget_sent()
        self.alive = False
        await self.here.pci.function_level_reset()

    # --- dirty logging -------------------------------------------------------------------------

    def look(self) -> set[int]:
        """Pages that the device has written since the last look."""
        for queue in self.here.member.function.common.state.queues:
            if queue.enabled:
                self.ram.give([(queue.device, ring_layout(queue.size).used)])
        changed = self.ram.changed()
        if self.here.member.logging.active:
            self.owed |= changed
        return changed

    async def start_logging(self) -> None:
        self.look()
        self.owed.clear()
        start = encode_logging_start(LoggingStart(PAGE))
        await self.here.device.feature(Feature.DMA_LOGGING_START, FeatureOperation.SET, start)

    async def stop_logging(self) -> None:
        await self.here.device.feature(Feature.DMA_LOGGING_STOP, FeatureOperation.SET, b"")
        self.owed.clear()

    async def report(self) -> None:
        report = encode_logging_report_request(LoggingReport(self.ram.iova, self.ram.size, PAGE))
        self.look()
        reply = await self.here.device.feature(
            Feature.DMA_LOGGING_REPORT, FeatureOperation.GET, report
        )
        reported = {self.ram.iova // PAGE + bit for bit in bits(reply[len(report) :])}
        assert self.owed <= reported, "written, and not in the report"
        self.owed.clear()

    # --- what must hold ------------------------------------------------------------------------

    async def check(self) -> None:
        await self.rest()
        await self.collect()
        for place in (self.here, self.there):
            await self._check_state(place)
        self._check_objects()
        self._check_frames()
        await self._check_service()
        changed = self.look()
        here = self.here
        assert not (here.was_stopped and changed), "stopped, and written"
        here.was_stopped = here.member.mode.stopped

    async def _check_state(self, place: Place) -> None:
        told, migration = await place.client.state(), place.migration
        if told is not ERROR:
            assert place.member.mode.stopped == (told not in (RUNNING, PRE_COPY)), told
            assert (migration._object is not None) == (told in SAVING or told is RESUMING), told

    def _check_objects(self) -> None:
        there = self.administration.objects._objects
        wanted = {}
        for place in (self.here, self.there):
            if place.migration._object is not None:
                loads = place.migration._loading is not None
                kind = ObjectKind.SET if loads else ObjectKind.GET
                wanted[place.migration._object] = (place.member.config.member_id, kind)
        found = {
            number: (made.member_id, made.kind)
            for number, made in there.items()
            if number not in self.strangers
        }
        lost = self.parts_owner._lost.keys()
        assert wanted.items() <= found.items(), "a migration has its object"
        assert found.keys() - wanted.keys() <= lost, "no other is forgotten"
        assert self.parts_owner._taken == wanted.keys() | lost
        assert wanted.keys().isdisjoint(lost)
        if not self.disturbed:
            assert not lost

    def _check_frames(self) -> None:
        for pair in range(PAIRS):
            came = self.came[pair]
            assert came == sorted(set(came)), "once, and in order"
            assert self.due[pair] <= set(came), "nothing is lost"
            assert set(came) <= self.due[pair] | self.perhaps, "nothing comes too early"
            got = self.from_peer[pair]
            assert got == sorted(set(got)), "once, and in order"
        assert set(self.from_peer[0]).isdisjoint(self.from_peer[1]), "once"
        delivered = 0
        for place in (self.here, self.there):
            statistics = place.member.statistics()
            assert not statistics.driver_errors
            delivered += place.member._switch.statistics(place.member).frames_out
            delivered -= statistics.filtered + statistics.missed + statistics.too_long
        if self.remote:
            assert self.arrived <= delivered
        else:
            assert self.arrived == delivered, "all that the switch gave"

    async def _check_service(self) -> None:
        here, driver = self.here, self.driver
        if not self.alive:
            return
        assert not await here.pci.status() & Status.DEVICE_NEEDS_RESET
        if here.member.mode.stopped or not here.mapped:
            return
        assert here.member.running
        for pair in range(driver.pairs):
            assert not driver.unsent(pair), "a member that runs sends"
        assert not driver.asked, "and carries out commands"
        state = attrs.evolve(here.member.state, announce=False)
        assert state == self.reference, "and is as its driver has left it"
