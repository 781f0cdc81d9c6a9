"""Every step of a move fails once, or is cancelled: real QEMUs and servers, no guest but firmware.

The source has to be afterwards what it was before, in all that can be asked of it.
"""

from __future__ import annotations

import argparse
import json
import signal
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING

import attrs
import pytest
import trio

from tests.server.vm.bare_qemu import bare_qemu
from tests.testbed.machine import vfio_user_pci
from tests.testbed.server_process import COMMAND, serve
from vfio_user_virtio.errors import HostError
from vfio_user_virtio_server import migrate_vm
from vfio_user_virtio_server.vm import pci_state
from vfio_user_virtio_server.vm.control import ServerControl, connect_server
from vfio_user_virtio_server.vm.errors import NotMovable
from vfio_user_virtio_server.vm.guest_pci import GuestFunction
from vfio_user_virtio_server.vm.move import STEPS, Move, MovedDevice, Place
from vfio_user_virtio_server.vm.qemu import Facts, Qemu
from vfio_user_virtio_server.vm.qtest import open_qtest

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from tests.testbed.bed import Bed
    from vfio_user_virtio_server.vm.control import ServedDevice
    from vfio_user_virtio_server.vm.pci_state import PciState
    from vfio_user_virtio_server.vm.qmp import Qmp

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

    async def end(self, *options: str, incoming: bool, second: bool = False, more: str = "") -> End:
        """`options` are the server's, `more` is a device of QEMU; `second`: two of ours."""
        self._count += 1
        folder = self._folder / f"end{self._count}"
        folder.mkdir()
        socket, control = folder / "vf.sock", folder / "control"
        served = ("--socket-path", str(socket), "--mac", "52:54:00:00:00:02", *options)
        served += ("--control-path", str(control))
        words = [*MEMORY, *vfio_user_pci(socket)]
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
            await self._firmware(qmp)
        return End(folder, Qemu(qmp), await enter(connect_server(str(control))))

    async def _firmware(self, qmp: Qmp) -> None:
        """Until it has given the device its addresses."""
        async with open_qtest(qmp) as qtest:
            with trio.fail_after(20):
                while True:
                    try:
                        function = await GuestFunction.find(qmp, qtest, "vf")
                    except HostError:
                        continue
                    if (await pci_state.read_config(function)).command & 2:
                        return


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


@pytest.mark.parametrize("offline", [False, True])
async def test_the_source_is_kept_if_told(offline: bool, bed: Bed, tmp_path: Path) -> None:
    async with open_rig(bed, tmp_path) as rig:
        source, target = await rig.end(incoming=False), await rig.end(incoming=True)
        done = moving(source, target, offline=offline, keep_source=True)
        await done.run()
        assert done.failed == []
        assert done.downtime is not None
        assert 0 < done.downtime < 20
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
        (note,) = migrate_vm.notes(move)
        assert "vf: the IOMMU of the source's host cannot tell which pages it writes" in note
        ends = argparse.Namespace(from_qmp="a", to_qmp="b")
        said = "\n".join(migrate_vm.lines(ends, move))
        assert "bytes of its own, stopped before the guest's memory was copied" in said
        assert await target.qemu.status() == "running"


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

        code, _, said = await run("--device", "vf=other")
        assert (code, "called other: none" in said) == (64, True), said
        code, _, said = await run("--device", "nic=device")
        assert code == 78
        assert "check: the source has no vfio-user-pci with id nic" in said
        assert said.endswith("nothing was changed\n")

        code, _, said = await run("--channel", "tcp:nowhere.invalid:1")
        assert code == 74
        assert "listen: the target's QEMU: migrate-incoming:" in said
        assert said.endswith("the source runs on, the target has ended\n")
        assert await source.qemu.status() == "running"

        target = await rig.end(incoming=True)
        code, text, said = await run("--json", "--device", "vf=device:device")
        assert (code, said) == (0, "")
        report = json.loads(text)
        assert [one["name"] for one in report["phases"]] == [step.name for step in STEPS]
        assert report["devices"][0]["id"] == "vf"
        assert report["failed"] == []

        source, target = target, await rig.end(incoming=True)
        code, text, said = await run()
        assert (code, said) == (0, "")
        assert text.splitlines()[-1].strip() == "the guest runs at the target"


async def test_control_c_cancels(bed: Bed, tmp_path: Path) -> None:
    async with open_rig(bed, tmp_path) as rig:
        source, target = await rig.end(incoming=False), await rig.end(incoming=True)
        # So slow that it cannot be over before the signal.
        await source.qemu.qmp.execute("migrate-set-parameters", max_bandwidth=10_000)
        source.qemu.qmp.forget_events()
        process = await trio.lowlevel.open_process(command(source, target), stderr=-1)
        await source.qemu.set_capabilities(frozenset({"events"}), True)
        await source.qemu.qmp.wait_event(lambda event: event.data.get("status") == "active")
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        said = b"".join([data async for data in process.stderr]).decode()
        assert await process.wait() == 130
        assert said.endswith("cancelled; the source runs on, the target has ended\n")
        assert await source.qemu.status() == "running"
        await target.qemu.qmp.wait_gone()
