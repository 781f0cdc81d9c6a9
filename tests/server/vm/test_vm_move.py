"""Every step of a move fails once, or is cancelled: real QEMUs and servers, no guest but firmware.

The source has to be afterwards what it was before, in all that can be asked of it.
"""

from __future__ import annotations

import json
import os
import pty
import re
import signal
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING

import attrs
import pytest
import trio

from tests.server.vm.bare_qemu import bare_qemu, firmware_done
from tests.testbed.machine import vfio_user_pci
from tests.testbed.server_process import COMMAND, serve
from vfio_user_virtio.errors import HostError
from vfio_user_virtio_server import picture
from vfio_user_virtio_server.pings import Ping
from vfio_user_virtio_server.vm import account, pci_state
from vfio_user_virtio_server.vm.control import ServerControl, connect_server
from vfio_user_virtio_server.vm.errors import NotMovable
from vfio_user_virtio_server.vm.guest_pci import GuestFunction
from vfio_user_virtio_server.vm.move import PRE_COPY, STEPS, STOPPED, Move, MovedDevice, Place
from vfio_user_virtio_server.vm.qemu import Facts, Qemu
from vfio_user_virtio_server.vm.qtest import open_qtest

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from tests.testbed.bed import Bed
    from vfio_user_virtio_server.vm.control import ServedDevice
    from vfio_user_virtio_server.vm.pci_state import PciState

pytestmark = pytest.mark.slow

MEMORY = (
    *("-object", "memory-backend-memfd,id=ram,size=64M,share=on"),
    *("-machine", "memory-backend=ram"),
)


TWO = """
[control]
socket_path = "{folder}/control"
[[owner]]
[[owner.member]]
name = "one"
socket_path = "{folder}/vf.sock"
mac = "52:54:00:00:00:02"
[[owner.member]]
name = "two"
socket_path = "{folder}/vf2.sock"
mac = "52:54:00:00:00:03"
"""


@attrs.frozen
class End:
    """A QEMU and its server."""

    folder: Path
    qemu: Qemu
    server: ServerControl

    async def remarkable(self) -> tuple[Facts, list[ServedDevice], PciState]:
        """All that a failed move must leave as it was."""
        async with open_qtest(self.qemu.qmp) as qtest:
            function = await GuestFunction.find(self.qemu.qmp, qtest, "vf")
            state = await pci_state.read_config(function)
        facts = await self.qemu.facts()
        return attrs.evolve(facts, migration=""), await self.server.devices(), state


class Rig:
    """Makes ends in `folder`."""

    def __init__(self, bed: Bed, folder: Path, stack: AsyncExitStack) -> None:
        self._bed = bed
        self._folder = folder
        self._stack = stack
        self._count = 0

    async def end(
        self,
        *options: str,
        incoming: bool,
        second: bool = False,
        conventional: bool = False,
        more: str = "",
    ) -> End:
        """`options` are the server's, `more` is a device of QEMU; `second`: two of ours.

        `conventional`: a machine without PCI Express.
        """
        self._count += 1
        folder = self._folder / f"end{self._count}"
        folder.mkdir()
        socket, control = folder / "vf.sock", folder / "control"
        served = ("--socket-path", str(socket), "--mac", "52:54:00:00:00:02", *options)
        served += ("--control-path", str(control))
        words = [*MEMORY, *vfio_user_pci(socket)]
        if conventional:
            address = {"type": "unix", "path": str(socket)}
            device = {"driver": "vfio-user-pci", "id": "vf", "socket": address}
            words = [*MEMORY, "-machine", "pc", "-device", json.dumps(device)]
        if second:
            (folder / "two.toml").write_text(TWO.format(folder=folder))
            served = ("--config", str(folder / "two.toml"))
            words += vfio_user_pci(folder / "vf2.sock", slot=2, ident="vf2")
        enter = self._stack.enter_async_context
        await enter(serve(folder, *served))
        words += ["-qmp", f"unix:{folder / 'qmp'},server=on,wait=off"]
        words += ["-incoming", "defer"] * incoming + ["-device", more] * bool(more)
        qmp = await enter(bare_qemu(self._bed, *words, name=folder.name))
        if not incoming:
            await qmp.execute("cont")
            await firmware_done(qmp)
        return End(folder, Qemu(qmp), await enter(connect_server(str(control))))


@asynccontextmanager
async def open_rig(bed: Bed, folder: Path) -> AsyncIterator[Rig]:
    async with AsyncExitStack() as stack:
        yield Rig(bed, folder, stack)


def moving(
    source: End,
    target: End,
    on_step: Callable[[str], None] = lambda _: None,
    *,
    offline: bool = False,
    keep_source: bool = False,
) -> Move:
    places = Place(source.server, "device"), Place(target.server, "device")
    device = MovedDevice("vf", *places)
    return Move(
        source.qemu,
        target.qemu,
        [device],
        offline=offline,
        keep_source=keep_source,
        on_step=on_step,
    )


class Injected(HostError):
    pass


def check_drawn(move: Move, how: str) -> None:
    """A move that was not done: as far as it came, what was undone, and while the guest stood."""
    drawn = account.Account("a", "b").drawn(move, f"{how}; {move.standing}")
    begun = [step for step in STEPS if step.name in {phase.name for phase in move.phases}]
    undone = [f"undo {step.name}" for step in reversed(begun) if step.undo is not None]
    assert [span.name for span in drawn.spans] == [*(step.name for step in begun), *undone]
    assert [span.name for span in drawn.spans if span.undone == how] == [begun[-1].name]
    down = {span.name for span in drawn.spans if span.down}
    names = {step.name for step in begun}
    assert down >= names & STOPPED
    assert not down - STOPPED - {f"undo {name}" for name in STOPPED | {PRE_COPY}}
    if drawn.stopped is not None:
        assert drawn.spans[0].start < drawn.stopped[0] < drawn.stopped[1] < drawn.end
    assert (drawn.stopped is not None) == bool(names & STOPPED)
    assert drawn.failure.startswith(how)
    picture.svg(drawn)


@pytest.mark.parametrize("how", ["fails", "is cancelled"])
async def test_a_step_that(how: str, bed: Bed, tmp_path: Path) -> None:
    async with open_rig(bed, tmp_path) as rig:
        source = await rig.end(incoming=False)
        target = await rig.end(incoming=True)
        before = await source.remarkable()
        assert before[0].status == "running"
        for step in STEPS if how == "fails" else STEPS[::3]:
            with trio.CancelScope() as scope:

                def stop(name: str, at: str = step.name, scope: trio.CancelScope = scope) -> None:
                    if name == at and how == "fails":
                        raise Injected("on purpose")
                    if name == at:
                        scope.cancel()

                move = moving(source, target, stop)
                try:
                    await move.run()
                except Injected:
                    assert how == "fails"
            assert scope.cancelled_caught == (how == "is cancelled")
            assert move.failed == []
            assert not move.target_runs
            assert await source.remarkable() == before, step
            check_drawn(move, "failed" if how == "fails" else "cancelled")
            touched = any(one.undo for one in STEPS[: STEPS.index(step) + 1])
            assert ("nothing was changed" in move.standing) == (not touched)
            if touched:
                await target.qemu.qmp.wait_gone()
                target = await rig.end(incoming=True)
            else:
                assert await target.qemu.status() == "inmigrate"
        done = moving(source, target)
        await done.run()
        assert done.target_runs
        await source.qemu.qmp.wait_gone()
        assert await target.qemu.status() == "running"


def check_told(done: Move, offline: bool) -> None:
    """By numbers, in words and as a picture: what moved when, and in which time the guest stood."""
    told = account.Account("a", "b", [Ping(1.0, 1.5)])
    data = json.loads(json.dumps(told.described(done)))
    phases = {phase["name"]: phase for phase in data["phases"]}
    assert list(phases) == [step.name for step in STEPS]
    assert phases["check"]["start"] == 0
    starts = [phase["start"] for phase in data["phases"]]
    assert starts == sorted(starts)
    moved = {name: phase["byte_count"] for name, phase in phases.items() if phase["byte_count"]}
    assert list(moved) == ["prepare devices", "pre-copy", "save devices", "switch over"]
    assert moved["pre-copy"] > 100_000
    saved = moved["prepare devices"] + moved["save devices"]
    assert 100_000 > saved == data["devices"][0]["image_bytes"]
    assert data["packets"] == {"sent": 1, "unanswered": 0, "slowest": 0.5, "silence": 0.5}
    said = list(told.lines(done))
    assert said[0].startswith("a to b in ")
    assert any(f"{moved['pre-copy']:,} bytes" in line for line in said)
    assert "packets to the guest: 1 sent, 0 unanswered, the slowest after 500 ms" in said[-2]
    drawn = told.drawn(done, "")
    down = [span.name for span in drawn.spans if span.down]
    stopped = [step.name for step in STEPS if step.name in STOPPED]
    assert down == ["pre-copy"] * offline + stopped
    assert drawn.down is not None
    assert drawn.down[1] - drawn.down[0] == pytest.approx(done.downtime, abs=0.2)
    assert drawn.facts["outcome"].startswith("the guest runs at the target")
    assert "device at both servers; " in drawn.facts["device vf"]
    picture.svg(drawn)


@pytest.mark.parametrize("offline", [False, True])
async def test_the_source_is_kept_if_told(offline: bool, bed: Bed, tmp_path: Path) -> None:
    async with open_rig(bed, tmp_path) as rig:
        source, target = await rig.end(incoming=False), await rig.end(incoming=True)
        done = moving(source, target, offline=offline, keep_source=True)
        await done.run()
        assert done.failed == []
        assert done.downtime is not None
        assert 0 < done.downtime < 20
        check_told(done, offline)
        assert await source.qemu.status() == "postmigrate"
        (device,) = await source.server.devices()
        assert device.state == "STOP"
        for end in (source, target):
            assert (await end.qemu.facts()).capabilities == frozenset()


async def test_a_device_that_logs_no_pages(
    bed: Bed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guest and device stop before memory is copied, and run on if that fails."""
    devices = ServerControl.devices

    async def without_pages(server: ServerControl) -> list[ServedDevice]:
        return [attrs.evolve(device, logs_pages=False) for device in await devices(server)]

    monkeypatch.setattr(ServerControl, "devices", without_pages)
    async with open_rig(bed, tmp_path) as rig:
        source = await rig.end(incoming=False)
        before = await source.remarkable()
        for step in ("pre-copy", "switch over"):
            target = await rig.end(incoming=True)

            def stop(name: str, at: str = step) -> None:
                if name == at:
                    raise Injected("on purpose")

            move = moving(source, target, stop)
            with pytest.raises(Injected):
                await move.run()
            assert move.failed == []
            assert await source.remarkable() == before
        target = await rig.end(incoming=True)
        move = moving(source, target)
        await move.run()
        assert move.target_runs
        assert move.failed == []
        assert move.devices[0].written == ()
        (note,) = account.notes(move)
        assert "vf: the IOMMU of the source's host cannot tell which pages it writes" in note
        said = "\n".join(account.Account("a", "b").lines(move))
        assert "bytes of its own, stopped before the guest's memory was copied" in said
        assert await target.qemu.status() == "running"


@pytest.mark.parametrize("conventional", [False, True])
async def test_a_guest_without_pci_express_stands_still(
    conventional: bool, bed: Bed, tmp_path: Path
) -> None:
    """While its registers are looked at, as the ports are its own; others are not disturbed."""
    async with open_rig(bed, tmp_path) as rig:
        source = await rig.end(incoming=False, conventional=conventional)
        target = await rig.end(incoming=True, conventional=conventional)
        seen: list[str] = []

        def note(step: str) -> None:
            if step == "listen":
                while (event := source.qemu.qmp.take_event(lambda _: True)) is not None:
                    seen.append(event.name)

        source.qemu.qmp.forget_events()
        move = moving(source, target, note)
        await move.run()
        assert move.target_runs
        assert seen == ["STOP", "RESUME"] * conventional


async def test_two_devices(bed: Bed, tmp_path: Path) -> None:
    """Each goes to its namesake, and all of them must be named."""
    async with open_rig(bed, tmp_path) as rig:
        source = await rig.end(incoming=False, second=True)
        target = await rig.end(incoming=True, second=True)
        devices = [
            MovedDevice(ident, Place(source.server, name), Place(target.server, name))
            for ident, name in (("vf", "one"), ("vf2", "two"))
        ]
        with pytest.raises(NotMovable, match="device vf2 of the source is not among those"):
            await Move(source.qemu, target.qemu, devices[:1]).run()
        done = Move(source.qemu, target.qemu, devices)
        await done.run()
        assert done.target_runs
        assert done.failed == []
        assert [device.state for device in await target.server.devices()] == ["RUNNING"] * 2
        states = [device.pci for device in devices]
        async with open_qtest(target.qemu.qmp) as qtest:
            for device, state in zip(devices, states, strict=True):
                there = await GuestFunction.find(target.qemu.qmp, qtest, device.ident)
                assert state is not None
                assert (await pci_state.read_config(there)).config == state.config


async def test_what_does_not_fit_is_refused_untouched(bed: Bed, tmp_path: Path) -> None:
    async with open_rig(bed, tmp_path) as rig:
        source = await rig.end(incoming=False)
        before = await source.remarkable()
        for options, more, said in (
            (("--queue-pairs", "2"), "", "the target would refuse what the source has"),
            ((), "edu", "the devices without an id are not the same"),
        ):
            target = await rig.end(*options, incoming=True, more=more)
            move = moving(source, target)
            with pytest.raises(NotMovable, match=said):
                await move.run()
            assert move.standing == "nothing was changed"
            assert await target.qemu.status() == "inmigrate"
            assert await source.remarkable() == before


def command(source: End, target: End, *options: str) -> list[str]:
    return [
        *(COMMAND, "migrate-vm"),
        *("--from-qmp", str(source.folder / "qmp"), "--to-qmp", str(target.folder / "qmp")),
        *("--from-control", str(source.folder / "control")),
        *("--to-control", str(target.folder / "control")),
        *options,
    ]


async def test_the_command_says_where_the_guest_is(bed: Bed, tmp_path: Path) -> None:
    async with open_rig(bed, tmp_path) as rig:
        source, target = await rig.end(incoming=False), await rig.end(incoming=True)

        async def run(*options: str) -> tuple[int, str, str]:
            done = await trio.run_process(
                command(source, target, *options),
                capture_stdout=True,
                capture_stderr=True,
                check=False,
            )
            return done.returncode, done.stdout.decode(), done.stderr.decode()

        svg = tmp_path / "r.svg"
        code, _, said = await run("--report", str(svg), "--ping", "no such host")
        assert code == 68
        assert said.endswith("to no such host: Name or service not known; nothing was changed\n")
        assert "to no such host" in svg.read_text()
        code, _, said = await run("--device", "vf=other")
        assert (code, "called other: none" in said) == (64, True), said
        code, _, said = await run("--device", "nic=device")
        assert code == 78
        assert "check: the source has no vfio-user-pci with id nic" in said
        assert said.endswith("nothing was changed\n")

        code, _, said = await run("--channel", "tcp:nowhere.invalid:1", "--report", str(svg))
        assert code == 74
        assert "listen: the target's QEMU: migrate-incoming:" in said
        assert said.endswith("the source runs on, the target has ended\n")
        assert await source.qemu.status() == "running"
        assert ">undo listen</text>" in svg.read_text()

        target = await rig.end(incoming=True)
        code, text, said = await run("--json", "--device", "vf=device:device")
        assert (code, said) == (0, "")
        report = json.loads(text)
        assert report["packets"] is None
        assert report["devices"][0]["id"] == "vf"
        assert report["failed"] == []
        # Until its QEMU has ended, or it would run at both ends for a moment.
        assert "it is let run again" not in (source.folder / "server.log").read_text()

        source, target = target, await rig.end(incoming=True)
        code, text, said = await run("--report", str(svg))
        assert (code, said) == (0, "")
        assert ">the guest runs at the target</text>" in svg.read_text()
        assert text.splitlines()[-1].strip() == "the guest runs at the target"


async def test_control_c_cancels(bed: Bed, tmp_path: Path) -> None:
    """In the midst of what a terminal shows of the pre-copy."""
    async with open_rig(bed, tmp_path) as rig:
        source, target = await rig.end(incoming=False), await rig.end(incoming=True)
        # So slow that it cannot be over before the signal.
        await source.qemu.qmp.execute("migrate-set-parameters", max_bandwidth=10_000)
        svg = tmp_path / "r.svg"
        ours, theirs = pty.openpty()
        try:
            process = await trio.lowlevel.open_process(
                command(source, target, "--report", str(svg)), stderr=theirs
            )
            os.close(theirs)
            shown = await _shown(ours, lambda text: " left, " in text)
            process.send_signal(signal.SIGINT)
            shown += await _shown(ours, lambda _: False)
        finally:
            os.close(ours)
        assert await process.wait() == 130
        assert "\r\33[Klook: ...\r" in shown
        assert re.search(
            r"pre-copy: [\d.]+ \wB sent, [\d.]+ MB left, "
            r"([\d.]+ \w?B/s, )?downtime up to 300 ms \+ ~\d+ \ws for devices\r",
            shown,
        ), shown
        assert "\r\33[Kundo listen: ...\r\33[K" in shown
        said = shown.rpartition("\33[K")[2]
        assert said.strip() == (
            "vfio-user-virtio: cancelled; the source runs on, the target has ended"
        )
        drawn = svg.read_text()
        assert ", cancelled</text>" in drawn
        assert ">cancelled; the source runs on, the target has ended</text>" in drawn
        assert await source.qemu.status() == "running"
        await target.qemu.qmp.wait_gone()


async def _shown(terminal: int, enough: Callable[[str], bool]) -> str:
    """What came out until it is enough, or nobody writes there any more."""
    shown = b""
    with trio.fail_after(30):
        while not enough(shown.decode()):
            await trio.lowlevel.wait_readable(terminal)
            try:
                shown += os.read(terminal, 4096)
            except OSError:
                break
    return shown.decode()
