"""Move a running guest to another QEMU, with the devices that our servers serve to both.

Stock QEMU migrates a VM with vfio-user devices and leaves the devices out.  This drives QEMU's own
migration and does beside it what QEMU does not: it logs what the devices write to guest memory from
before the first page is copied, and brings over what they are by then; stops them when the guest
has stopped and its memory is not final yet (``pause-before-switchover``); has QEMU send the pages
again that they wrote; and before the guest runs at the target gives it the devices' PCI state and
the rest of their own.

Rejected: to copy those pages from server to server.  It works, but only once QEMU has loaded all
memory, so that it adds to the downtime whole (150 ms for 550 pages, where marking them takes 6),
and it needs a channel of its own between two hosts.

A physical VF behind an IOMMU that does not track pages may have written any of them, each time one
asks.  Copying them while it runs would be in vain, so guest and device are stopped first.  To mark
all pages takes as long as to copy them (1.5 s for 256 MiB of zeros), and the copy comes on top.

`STEPS` is the whole of it: what is done and how that is undone.  When a step fails, or the caller
is cancelled, the steps that have begun are undone, the last first: the target is ended, the devices
of the source run, its guest runs.  Each undoing is right at whatever point its step was
interrupted, and is tried even if another failed.  Only the target's ``cont`` cannot be undone.  As
long as it may have been obeyed, the source's guest does not run: its way back begins with the
target's end.

If another process is killed, `standing` says what becomes of the guest.  If it is this one, the
servers let go of what it held by themselves, and `take_back` lets the source's guest run.  The
target never runs then, since nobody says ``cont``.

The target's own ``-S`` is not relied on: ``stop`` is said to it while it waits.  The source ends
when the target runs, unless `keep_source`; then it stays stopped, and its devices with it.

Source: QEMU 11.1.3, qapi/migration.json; measured with Linux guests under TCG.
"""

from __future__ import annotations

import contextlib
import socket
from functools import partial
from typing import TYPE_CHECKING, Final

import attrs
import trio

from vfio_user_virtio.errors import HostError
from vfio_user_virtio_server.spans import timed
from vfio_user_virtio_server.vm import comparison, device_state, pci_state, standing
from vfio_user_virtio_server.vm.errors import Gone, NotMovable, QemuError, QemuGone
from vfio_user_virtio_server.vm.marking import mark_written
from vfio_user_virtio_server.vm.qemu import NEEDED
from vfio_user_virtio_server.vm.qtest import open_qtest
from vfio_user_virtio_server.vm.together import all_of, both

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from vfio_user_virtio.control.records import Range
    from vfio_user_virtio_server.spans import Span
    from vfio_user_virtio_server.vm.control import ServerControl
    from vfio_user_virtio_server.vm.guest_pci import GuestFunction
    from vfio_user_virtio_server.vm.pci_state import PciState
    from vfio_user_virtio_server.vm.qemu import Facts, Qemu, Ram
    from vfio_user_virtio_server.vm.qmp import Event
    from vfio_user_virtio_server.vm.qtest import Qtest

EVENT_SECONDS: Final = 2.0
"""How long an event of a command that has been answered may be late."""

LOOK: Final = "look"
PRE_COPY: Final = "pre-copy"
SWITCH_OVER: Final = "switch over"
"""Steps that are told apart: in the last two QEMU sends the guest's memory."""

_FDNAME: Final = "vfio-user-virtio-migration"


@attrs.frozen
class Place:
    """Where a device is served: its server, and what that calls it."""

    server: ServerControl
    device: str


@attrs.define
class MovedDevice:
    """A device of the guest: its id in both QEMUs, and where it is served.

    `logged`: its server can tell which pages it writes.
    """

    ident: str
    source: Place
    target: Place
    announced: bool = False
    logged: bool = True
    function: GuestFunction | None = None
    layout: PciState | None = None
    there: GuestFunction | None = None
    fresh: PciState | None = None
    """The function at the target, as it is before the guest comes."""
    pci: PciState | None = None
    first: bytes = b""
    rest: bytes = b""
    """Its state: what was so while the guest ran, and what is else in the end."""
    written: Sequence[Range] = ()

    @property
    def image_bytes(self) -> int:
        return len(self.first) + len(self.rest)

    @property
    def written_bytes(self) -> int:
        return sum(one.size for one in self.written)


@attrs.frozen
class Step:
    """`do` and, if it changes something, `undo`."""

    name: str
    do: Callable[[Move], Awaitable[None]]
    undo: Callable[[Move], Awaitable[None]] | None = None


class Move:
    """One guest's way from `source` to `target`; `run` does it, once.

    `channel`: where the QEMUs meet, as ``migrate`` has it; None makes a socket pair, which is for
    two on one host.  `offline`: stop the guest first.  `on_step` is told of each step by name, and
    `on_look` when there is something new in `looks`.
    """

    def __init__(
        self,
        source: Qemu,
        target: Qemu,
        devices: Sequence[MovedDevice],
        *,
        channel: str | None = None,
        offline: bool = False,
        keep_source: bool = False,
        on_step: Callable[[str], None] = lambda _: None,
        on_look: Callable[[], None] = lambda: None,
    ) -> None:
        self.devices = devices
        self.facts: Sequence[Facts] = ()
        """Of source and target, as they were found."""
        self.phases: list[Span] = []
        """Steps; if one was not done, then what was undone."""
        self.looks: list[tuple[float, Ram]] = []
        """QEMU's pre-copy as it went, by trio's clock."""
        self.failed: list[str] = []
        """What could not be undone, or not be ended, in words."""
        self.target_runs = False
        self.stopped: Event | None = None
        self.resumed: Event | None = None
        """Of the guest, at the source and where it went on."""
        self._source = source
        self._target = target
        self._channel = channel
        self._offline = offline
        self._keep_source = keep_source
        self._on_step = on_step
        self._on_look = on_look
        self._source_qtest: Qtest | None = None
        self._target_qtest: Qtest | None = None
        self._begun: list[Step] = []
        self._touched = False
        self._target_may_run = False
        self._target_ran = False
        self._gone: set[str] = set()
        """Who was found gone when the source was to run on."""
        self._turned_on: dict[str, frozenset[str]] = {}

    @property
    def step(self) -> str:
        """The step that began last."""
        return self._begun[-1].name if self._begun else STEPS[0].name

    @property
    def standing(self) -> str:
        """Where the guest is now, in words."""
        return standing.in_words(
            arrived=self.target_runs,
            touched=self._touched,
            source_gone=self._source.name in self._gone,
            server_gone=bool(self._gone),
            failed=self.failed,
        )

    @property
    def downtime(self) -> float | None:
        """Seconds in which the guest did not run, by the clocks of the QEMUs; None if unknown."""
        if self.stopped is None or self.resumed is None:
            return None
        return self.resumed.seconds - self.stopped.seconds

    @property
    def _unlogged(self) -> list[MovedDevice]:
        return [one for one in self.devices if not one.logged]

    async def run(self) -> None:
        """Raises HostError, when what was begun has been undone."""
        async with contextlib.AsyncExitStack() as stack:
            self._source_qtest, self._target_qtest = [
                await stack.enter_async_context(open_qtest(qemu.qmp, qemu.forwarded))
                for qemu in (self._source, self._target)
            ]
            try:
                for step in STEPS:
                    await self._do(step)
            finally:
                if not self.target_runs:
                    with trio.CancelScope(shield=True):
                        await self._undo()
            with trio.CancelScope(shield=True):
                await self._end()

    async def _do(self, step: Step) -> None:
        self._begun.append(step)
        with timed(self.phases, step.name, down=step.name in STOPPED):
            self._on_step(step.name)
            await trio.lowlevel.checkpoint_if_cancelled()
            await step.do(self)
        self._touched |= step.undo is not None

    async def _undo(self) -> None:
        for step in reversed(self._begun):
            if step.undo is None:
                continue
            self._touched = True
            name = f"undo {step.name}"
            self._on_step(name)
            try:
                with timed(self.phases, name, down=step.name in STOPPED):
                    await step.undo(self)
            except Gone as error:
                self._gone.add(error.who)
            except HostError as error:
                self.failed.append(str(error))
        self._account_ram()
        if any(step.name == PRE_COPY for step in self._begun):
            self.stopped = self._source.qmp.take_event(_is_stop)
            self.resumed = self._source.qmp.take_event(_is_resume)

    # --- before anything is touched ------------------------------------------------------------

    async def _check(self) -> None:
        source, target = self.facts = await both(self._source.facts, self._target.facts)
        problems = comparison.compare(source, target, [one.ident for one in self.devices])
        if not self.devices:
            problems.append("no device is named that is to be moved")
        named = {one.ident for one in self.devices}
        problems += [
            f"device {ident} of the source is not among those to be moved"
            for ident in source.devices
            if ident not in named
        ]
        for one in self.devices:
            here, there = [
                {served.name: served for served in await place.server.devices()}.get(place.device)
                for place in (one.source, one.target)
            ]
            if here is None or there is None:
                missing = one.source if here is None else one.target
                problems.append(f"no server given serves a device {missing.device}")
            else:
                problems += comparison.compare_served(here, there)
                one.announced = here.announces and there.announces
                one.logged = here.logs_pages
        if problems:
            raise NotMovable(problems)
        for qemu, facts in ((self._source, source), (self._target, target)):
            self._turned_on[qemu.name] = frozenset(NEEDED) - facts.capabilities

    async def _look(self) -> None:
        """Find the functions at the source; see whether they can be taken, and would be."""
        assert self._source_qtest is not None
        problems = []
        for one in self.devices:
            found = await device_state.look(one, self._source, self._source_qtest)
            problems += [f"{one.ident}: {problem}" for problem in found]
        if problems:
            raise NotMovable(problems)

    # --- while the guest runs ------------------------------------------------------------------

    async def _listen(self) -> None:
        for qemu in (self._source, self._target):
            await qemu.set_capabilities(self._turned_on[qemu.name], True)
        await self._target.qmp.execute("stop")  # in this state: do not run when all is there
        uri = self._channel
        if uri is None:
            uri = f"fd:{_FDNAME}"
            pair = socket.socketpair()
            for qemu, end in zip((self._source, self._target), pair, strict=True):
                with end:
                    await qemu.qmp.execute("getfd", fds=[end.fileno()], fdname=_FDNAME)
        await self._target.qmp.execute("migrate-incoming", uri=uri)

    async def _stop_listening(self) -> None:
        await self._discard_target()
        await self._source.set_capabilities(self._turned_on[self._source.name], False)

    async def _discard_target(self) -> None:
        await self._target.quit()
        self._target_may_run = False

    async def _compare_functions(self) -> None:
        assert self._target_qtest is not None
        for one in self.devices:
            await device_state.find_there(one, self._target_qtest)

    async def _prepare_devices(self) -> None:
        await all_of(partial(device_state.prepare, one) for one in self.devices)
        self.phases[-1].byte_count = sum(len(one.first) for one in self.devices)

    async def _forget_devices(self) -> None:
        for one in self.devices:
            await one.source.server.release(one.source.device)

    async def _copy(self) -> None:
        """QEMU's own migration up to the point at which the guest has stopped."""
        self._source.qmp.forget_events()
        self._target.qmp.forget_events()
        stops = self._offline or bool(self._unlogged)
        if stops:
            await self._source.qmp.execute("stop")
        for one in self._unlogged:
            await one.source.server.stop(one.source.device)
        await self._source.qmp.execute("migrate", uri=self._channel or f"fd:{_FDNAME}")
        await self._source.wait_migration("pre-switchover", on_look=self._look_at_ram)
        if stops:  # how much it was until now, it does not say later
            await self._source.migration()
            self._look_at_ram()

    def _look_at_ram(self) -> None:
        ram = self._source.ram
        if ram is not None:
            self.looks.append((trio.current_time(), ram))
            self.phases[-1].byte_count = ram.sent
            self._on_look()

    async def _run_source(self) -> None:
        await self._source.give_up()
        for one in self._unlogged:
            await one.source.server.release(one.source.device)
        if self._target_may_run:
            raise QemuError(
                f"{self._source.name} stays stopped, as {self._target.name} may have been started "
                "and does not end: end one of the two, and say cont to the other"
            )
        if self._target_ran:
            raise QemuError(
                f"{self._source.name} stays stopped, as the guest has run at the target before "
                "that ended: cont lets it go on from where it was moved"
            )
        await self._source.run()

    # --- while it is stopped -------------------------------------------------------------------

    async def _stop_devices(self) -> None:
        await all_of(partial(device_state.stop, one) for one in self.devices)

    async def _release_devices(self) -> None:
        for one in self.devices:
            await one.source.server.release(one.source.device)
            if one.announced:
                await one.source.server.announce(one.source.device)

    async def _save_devices(self) -> None:
        await all_of(partial(device_state.save, one) for one in self.devices)
        self.phases[-1].byte_count = sum(len(one.rest) for one in self.devices)

    async def _put_intx_back(self) -> None:
        for one in self.devices:
            if one.function is not None and one.pci is not None:
                await pci_state.with_command(one.function, one.pci)

    async def _mark_pages(self) -> None:
        assert self._source_qtest is not None
        for one in self.devices:
            self.phases[-1].page_count += await mark_written(self._source_qtest, one.written)

    async def _switch_over(self) -> None:
        """QEMU sends the rest; meanwhile the devices are loaded, which does not need it."""
        loads = [partial(device_state.load, one) for one in self.devices]
        await all_of((self._send_rest, *loads))

    async def _send_rest(self) -> None:
        await self._source.qmp.execute("migrate-continue", state="pre-switchover")
        try:
            await self._source.wait_migration("completed")
            await self._target.wait_migration("completed")
        except QemuGone:  # what the source sent before its end may be all of it
            if not await self._target.completes():
                raise
        status = await self._target.status()
        if status != "paused":
            raise QemuError(f"{self._target.name} is {status} with the guest in it, not paused")

    async def _restore_pci(self) -> None:
        for one in self.devices:
            await device_state.restore_pci(one)

    async def _resume_devices(self) -> None:
        for one in self.devices:
            await one.target.server.resume(one.target.device)

    async def _run_target(self) -> None:
        with trio.CancelScope(shield=True):
            self._target_may_run = True
            await self._target.qmp.execute("cont")
            self._target_ran = True
            await self._target.status()  # if it has ended already, the source must not
            self.target_runs = True

    # --- there ---------------------------------------------------------------------------------

    async def _end(self) -> None:
        """The guest is at the target; what fails now is told, and no more."""
        with contextlib.suppress(QemuError), trio.move_on_after(EVENT_SECONDS):
            self.stopped = await self._source.qmp.wait_event(_is_stop)
            self.resumed = await self._target.qmp.wait_event(_is_resume)
        with contextlib.suppress(QemuError):
            await self._source.migration()
        self._account_ram()
        for part in (self._end_source, self._tidy_target):
            try:
                await part()
            except HostError as error:
                self.failed.append(str(error))

    async def _end_source(self) -> None:
        """A device stays stopped until its server sees that its QEMU has ended."""
        if self._keep_source:
            await self._source.set_capabilities(self._turned_on[self._source.name], False)
            await self._leave_devices()
            return
        with contextlib.suppress(HostError):
            await self._leave_devices()
        await self._source.quit()

    async def _leave_devices(self) -> None:
        await self._source.status()  # of one that has ended already, nothing would end the stop
        for one in self.devices:
            await one.source.server.leave_stopped(one.source.device)

    async def _tidy_target(self) -> None:
        await self._target.set_capabilities(self._turned_on[self._target.name], False)

    def _account_ram(self) -> None:
        """What went while the guest ran, and what went then, as QEMU tells it in the end."""
        ram = self._source.ram
        named = {phase.name: phase for phase in self.phases}
        if ram is None or PRE_COPY not in named:
            return
        if ram.sent_running:
            named[PRE_COPY].byte_count = ram.sent_running
        if SWITCH_OVER in named:
            named[SWITCH_OVER].byte_count = ram.sent - named[PRE_COPY].byte_count


STEPS: Final = (
    Step("check", Move._check),
    Step(LOOK, Move._look),
    Step("listen", Move._listen, Move._stop_listening),
    Step("compare functions", Move._compare_functions),
    Step("prepare devices", Move._prepare_devices, Move._forget_devices),
    Step(PRE_COPY, Move._copy, Move._run_source),
    Step("stop devices", Move._stop_devices, Move._release_devices),
    Step("save devices", Move._save_devices, Move._put_intx_back),
    Step("mark pages", Move._mark_pages),
    Step(SWITCH_OVER, Move._switch_over, Move._discard_target),
    Step("restore PCI state", Move._restore_pci),
    Step("resume devices", Move._resume_devices),
    Step("run", Move._run_target, Move._discard_target),
)
"""In their order.  A target that was ended once is ended: its undoing may be said again."""

STOPPED: Final = frozenset(
    step.name for step in STEPS[[step.name for step in STEPS].index("stop devices") :]
)
"""The steps in which the guest does not run."""


def _is_stop(event: Event) -> bool:
    return event.name == "STOP"


def _is_resume(event: Event) -> bool:
    return event.name == "RESUME"
