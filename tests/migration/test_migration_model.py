"""A member that is migrated, against a model: client, driver, owner, guest and peer in any order.

What they do is here, and what must hold after each step is `model_world`'s.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Final

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from tests.backends.dirty_rig import watch_guests
from tests.backends.member_rig import BROADCAST, configs
from tests.migration.model_rig import Fault
from tests.migration.model_world import (
    OBJECTS,
    RESUMING,
    RUNNING,
    STOP,
    STOP_COPY,
    World,
)
from vfio_user_virtio.backends.software.owner import Owner
from vfio_user_virtio.device import FeatureOperation
from vfio_user_virtio.errors import ClientError
from vfio_user_virtio.migration.states import (
    EVERYTHING,
    STOP_AND_COPY,
    VFIO_USER,
    WITHOUT_PRE_COPY,
)
from vfio_user_virtio.migration.stream import encode_image
from vfio_user_virtio.protocol.feature import Feature
from vfio_user_virtio.protocol.migration import MigrationFlags, MigrationState
from vfio_user_virtio.testing.control_commands import RX_MODES
from vfio_user_virtio.testing.net_driver import KNOWN_FEATURES
from vfio_user_virtio.virtio.admin_commands import ObjectKind
from vfio_user_virtio.virtio.features import Feature as NetFeature
from vfio_user_virtio.virtio.net_control import GUEST_OFFLOADS
from vfio_user_virtio.virtio.parts import encode_parts

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from tests.migration.model_rig import Place

FEATURES: Final = (
    KNOWN_FEATURES,
    KNOWN_FEATURES & ~(NetFeature.EVENT_IDX.mask | NetFeature.INDIRECT_DESC.mask),
    KNOWN_FEATURES & ~(NetFeature.MQ.mask | NetFeature.MRG_RXBUF.mask),
)
MACS: Final = tuple(bytes((2, 0, 0, 0, 1, number)) for number in range(3))
FOREIGN: Final = bytearray(
    encode_image(encode_parts(Owner("other").add_member(configs(MACS[0])[0]).mode.parts()))
)
"""Of a member with one queue pair."""

pairs = st.integers(0, 1)
counts = st.integers(1, 5)
states = st.sampled_from(sorted(MigrationState))
mostly = st.sampled_from([True, True, True, False])
hosts = st.booleans()
"""Whether it is the place where the guest is, or the other one."""


def alive(machine: MigrationMachine) -> bool:
    return machine.world.alive


def commandable(machine: MigrationMachine) -> bool:
    return machine.world.alive and machine.world.driver.has(NetFeature.CTRL_VQ)


class MigrationMachine(RuleBasedStateMachine):
    """See the module head."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = pytest.MonkeyPatch()
        watch_guests(self.patches)
        self.images: list[bytes] = []

    @initialize(
        options=st.sampled_from([EVERYTHING, VFIO_USER, WITHOUT_PRE_COPY, STOP_AND_COPY]),
        features=st.sampled_from(FEATURES),
        remote=st.booleans(),
    )
    def begin(self, options: MigrationFlags, features: int, remote: bool) -> None:
        self.world = World(options, features, remote=remote)

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.close()
        self.patches.undo()

    def do(self, step: Callable[..., Awaitable[object]], *args: object) -> bool:
        """Do it, or be refused."""
        try:
            self.world.loop.call(step, *args)
        except ClientError:
            return False
        return True

    def place(self, here: bool) -> Place:
        return self.world.here if here else self.world.there

    # --- the driver and its peer ----------------------------------------------------------------

    @precondition(alive)
    @rule(pair=pairs, count=counts, to=st.sampled_from([None, None, BROADCAST, *MACS]))
    def traffic(self, pair: int, count: int, to: bytes | None) -> None:
        self.do(self.world.send, pair, count)
        self.do(self.world.peer_sends, to, pair, 5 - count)

    @precondition(alive)
    @rule(pair=pairs, buffers=st.integers(0, 8))
    def starve_or_post(self, pair: int, buffers: int) -> None:
        world = self.world

        async def post() -> None:
            if pair < world.driver.pairs:
                if buffers:
                    await world.driver.post(pair, buffers)
                else:
                    await world.peer_sends(None, pair, 10)
                    await world.rest()
                    await world.collect(repost=False)

        self.do(post)

    @precondition(commandable)
    @rule(
        mode=st.sampled_from(RX_MODES[:5]),
        on=st.booleans(),
        mac=st.sampled_from(MACS),
        vlan=st.integers(0, 4095),
        number=st.integers(0, 3),
        offloads=st.integers(0, (1 << 64) - 1),
    )
    def commands(
        self, mode: str, on: bool, mac: bytes, vlan: int, number: int, offloads: int
    ) -> None:
        """Some that the device takes, and some that it does not."""
        world, control = self.world, self.world.driver.control

        async def change() -> None:
            await control.set_rx_mode(mode, on)
            await (control.add_vlan(vlan) if on else control.remove_vlan(vlan))
            match number:
                case 0:
                    await control.set_mac(mac)
                case 1:
                    await control.set_mac_table([mac, mac[::-1]], [BROADCAST] * (vlan % 3))
                case 2:
                    await control.set_offloads(offloads & world.driver.features & GUEST_OFFLOADS)
                case _:
                    await control.set_pairs(vlan % 4)
                    await control.acknowledge_announcement()

        self.do(change)

    @precondition(alive)
    @rule(data=st.data())
    def reset_queue(self, data: st.DataObject) -> None:
        """An idle one, so that nothing is lost by it."""
        world = self.world
        idle = [pair for pair in range(world.driver.pairs) if not world.driver.unsent(pair)]
        if idle:
            self.do(world.driver.reset_queue, 2 * data.draw(st.sampled_from(idle)) + 1)

    @rule(what=st.sampled_from(["driver", "function", "here", "there"]), again=mostly)
    def reset(self, what: str, again: bool) -> None:
        """And mostly the driver starts again."""
        world = self.world
        if what == "driver":
            self.do(world.start_driver)
        elif what == "function":
            self.do(world.function_level_reset)
        else:
            place = self.place(what == "here")
            world.queue.disarm()
            self.do(world.reset, place)
            assert place.migration.state is RUNNING
        if again and not world.alive:
            self.do(world.start_driver)

    # --- the owner -----------------------------------------------------------------------------

    @rule(fault=st.sampled_from(Fault), left=st.integers(1, 6))
    def arm(self, fault: Fault, left: int) -> None:
        self.world.arm(fault, left)

    @rule(
        first=st.integers(0, OBJECTS),
        count=st.integers(0, OBJECTS),
        kind=st.sampled_from(ObjectKind),
    )
    def others_use_objects(self, first: int, count: int, kind: ObjectKind) -> None:
        if count:
            self.do(self.world.others_make_objects, first, count, kind)
        else:
            self.do(self.world.others_are_done)

    # --- the client ----------------------------------------------------------------------------

    @rule(here=hosts, state=states, count=st.integers(0, 4))
    def set_state(self, here: bool, state: MigrationState, count: int) -> None:
        """In the middle of some traffic."""
        place = self.place(here)

        async def run() -> None:
            if self.world.alive:
                await self.world.send(0, count)
            await self.world.peer_sends(None, 0, count)
            await place.client.set_state(state)

        if self.do(run):
            assert place.migration.state is state

    @rule(here=hosts, count=st.sampled_from([0, 1, 15, 100, 1 << 20]))
    def read_or_ask(self, here: bool, count: int) -> None:
        device = self.place(here).device
        if count:
            self.do(device.migration_read, count)
        else:
            self.do(device.precopy_info)
            self.do(device.feature, Feature.MIG_DATA_SIZE, FeatureOperation.GET, b"")

    @rule(
        data=st.data(),
        kind=st.sampled_from(["good", "truncated", "corrupted", "twice", "foreign"]),
        piece=st.sampled_from([100, 1 << 20]),
        first=mostly,
        then=st.sampled_from([None, STOP, RUNNING]),
    )
    def write(
        self,
        data: st.DataObject,
        kind: str,
        piece: int,
        first: bool,
        then: MigrationState | None,
    ) -> None:
        """A stream of the guest's device, or what became of it; the guest's memory stays here."""
        if not self.images:
            self.do(self._save)
        stream = bytearray(data.draw(st.sampled_from([FOREIGN, *self.images][-2:])))
        at = data.draw(st.integers(0, len(stream) - 1))
        image_end = 16 + int.from_bytes(stream[:8], "little")
        if kind == "truncated":
            del stream[at:]
        elif kind == "corrupted":
            stream[at] ^= data.draw(st.integers(1, 255))
        elif kind == "twice":
            stream *= 2
        elif kind == "foreign":
            stream = FOREIGN
        place = self.world.there
        cut = kind == "truncated" and at != image_end and place.migration.state is not RESUMING

        async def run() -> None:
            if first and place.migration.state is not RESUMING:
                await place.client.set_state(RUNNING)
                await place.client.set_state(RESUMING)
            for start in range(0, len(stream), piece):
                await place.device.migration_write(bytes(stream[start : start + piece]))

        written = self.do(run)
        if then is not None:
            finished = self.do(place.client.set_state, then)
            assert not (first and written and cut and finished), "a stream that is cut is none"

    async def _save(self) -> None:
        client = self.world.here.client
        await client.set_state(RUNNING)
        await client.set_state(STOP_COPY)
        self.images.append(await client.read_all())
        await client.set_state(RUNNING)

    @rule(here=hosts, state=states, fault=st.sampled_from([None, Fault.LOST, Fault.HUNG]))
    def lose_client(self, here: bool, state: MigrationState, fault: Fault | None) -> None:
        """While it waits for an answer, if there is a fault."""
        if fault is None:
            self.do(self.world.replace_client, self.place(here))
        else:
            self.world.arm(fault, 1 + state % 4)
            self.do(self.world.cancel, self.place(here), state, 0.5)

    @rule(traffic=st.integers(0, 5), piece=st.sampled_from([100, 1 << 20]), log=mostly)
    def migrate(self, traffic: int, piece: int, log: bool) -> None:
        self.do(partial(self.world.migrate, traffic=traffic, piece=piece, log=log))

    @rule(delay=st.sampled_from([0.0, 0.01, 0.3, 3.0]))
    def change_memory(self, delay: float) -> None:
        """Slower, if it is by messages, and elsewhere in the server."""
        self.world.memory.delay = delay * self.world.remote
        self.do(self.world.unmap)
        self.do(self.world.map)

    @rule(what=st.sampled_from(["start", "report", "report", "stop"]))
    def log(self, what: str) -> None:
        world = self.world
        steps = {
            "start": world.start_logging,
            "report": world.report,
            "stop": world.stop_logging,
        }
        self.do(steps[what])

    # --- all of it -----------------------------------------------------------------------------

    @invariant()
    def holds(self) -> None:
        if hasattr(self, "world"):
            assert self.do(self.world.check)


MigrationMachine.TestCase.settings = settings(
    max_examples=32, stateful_step_count=40, deadline=None
)
TestMigrationModel = MigrationMachine.TestCase
