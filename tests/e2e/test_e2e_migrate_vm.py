"""A running Linux guest goes to another stock QEMU and another server, under traffic."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any, Final

import attrs
import pytest
import trio

from tests.e2e import moving
from tests.e2e.loading import LATE, check_load, insert_step, open_late, start_load
from vfio_user_virtio.errors import HostError
from vfio_user_virtio_server.vm.move import Step

if TYPE_CHECKING:
    from pathlib import Path

    from tests.testbed.bed import Bed
    from tests.testbed.machine import Machine
    from tests.testbed.netns import Netns

MOVES: Final = 10

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


@pytest.mark.parametrize(
    ("machine", "nics"),
    [
        pytest.param(
            attrs.evolve(moving.MACHINE, cpus=2, memory_mib=128),
            moving.TWO,
            id="multiqueue-two",
        ),
        pytest.param(attrs.evolve(moving.MACHINE, append="pci=nomsi"), (moving.ONLY,), id="intx"),
    ],
)
async def test_there_and_back(
    machine: Machine,
    nics: tuple[moving.Nic, ...],
    bed: Bed,
    netns: Netns,
    tmp_path: Path,
) -> None:
    """Each move from where the last has brought the guest; its memory is never at rest."""
    async with AsyncExitStack() as stack:
        enter = stack.enter_async_context
        mover = await enter(moving.open_mover(bed, netns, tmp_path, machine=machine, nics=nics))
        here = await mover.end(incoming=False)
        pause = moving.PAUSE * len(nics)
        await start_load(here.guest)
        passing = [
            await enter(moving.running_traffic(netns, here.guest, nic, pause=pause)) for nic in nics
        ]
        await netns.run("sh", "-c", f"echo 0 0 >{moving.MAY_PING}")
        for number in range(MOVES):
            there = await mover.end(incoming=True)
            drawn = tmp_path / f"move{number}.svg"
            pinged = number == 0
            options = ["--report", str(drawn), *("--ping", nics[0].guest) * pinged]
            command = moving.command(here, there, "--json", *options)
            done = await trio.run_process(netns.wrap(command), capture_stdout=True)
            report = json.loads(done.stdout)
            assert report["failed"] == []
            check_drawn(ET.parse(drawn).getroot(), report, pinged=pinged)
            print(number, report["devices"], report["downtime_seconds"], report["stopped_seconds"])
            assert await here.guest.process.wait() == 0, "the source has ended"
            for one in passing:
                await one.pass_more(4)
            here = there
        await check_load(here.guest)
        for one in passing:
            await one.check(here.guest, moves=MOVES)
        assert await here.guest.kernel_complaints() == []


def check_drawn(picture: ET.Element, told: dict[str, Any], *, pinged: bool) -> None:
    """The picture has what was told: phases, and a mark for each packet of the guest."""
    namespace = "{http://www.w3.org/2000/svg}"
    texts = [one.text for one in picture.iter(f"{namespace}text")]
    assert "While nothing ran" in texts
    assert texts.count("pre-copy") == 2, "the fact and the phase"
    names = [phase["name"] for phase in told["phases"]]
    assert {texts.count(name) for name in names[: names.index("pre-copy")]} == {1}
    assert {texts.count(name) for name in names[names.index("pre-copy") + 1 :]} == {2}
    assert "the guest runs at the target" in texts
    packets = told["packets"]
    assert (packets is not None) is pinged
    assert ("packets" in texts) is pinged
    if packets is not None:
        marks = [f"{namespace}circle", f"{namespace}path"]
        answered, lost = (len(list(picture.iter(mark))) for mark in marks)
        assert answered >= packets["sent"] - packets["unanswered"] > 10, "some of them twice"
        assert lost >= packets["unanswered"]
        print(packets)


async def test_pages_that_are_not_marked_are_stale(
    bed: Bed, netns: Netns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What comes when the guest has stopped is answered at the target: if QEMU is told of it."""
    async with AsyncExitStack() as stack:
        mover = await stack.enter_async_context(moving.open_mover(bed, netns, tmp_path))
        here = await mover.end(incoming=False)
        late = await stack.enter_async_context(open_late(netns, here.guest, moving.ONLY))
        insert_step(monkeypatch, "stop devices", Step("late frames", lambda _: late.send(here)))
        for marked in (True, False):
            there = await mover.end(incoming=True)
            await moving.move(here, there, marked=marked)
            assert await late.answered() == (LATE if marked else 0)
            here = there
        assert await here.guest.kernel_complaints() == []


class Injected(HostError):
    """A step that was made to fail."""


async def test_the_source_runs_on_whatever_fails(bed: Bed, netns: Netns, tmp_path: Path) -> None:
    """Failures, then cancellations, at steps of each kind; and after all that the guest moves."""
    async with moving.open_mover(bed, netns, tmp_path) as mover:
        here = await mover.end(incoming=False)
        async with moving.running_traffic(netns, here.guest) as passing:
            for step in ("prepare devices", "mark pages", "restore PCI state", "run"):

                def fail(name: str, at: str = step) -> None:
                    if name == at:
                        raise Injected("on purpose")

                there = await mover.end(incoming=True)
                with pytest.raises(Injected):
                    await moving.move(here, there, fail)
                await there.guest.process.wait()
                await passing.pass_more(4)

            for step in ("pre-copy", "switch over", "resume devices"):
                with trio.CancelScope() as scope:

                    def cancel(name: str, at: str = step, scope: trio.CancelScope = scope) -> None:
                        if name == at:
                            scope.cancel()

                    there = await mover.end(incoming=True)
                    await moving.move(here, there, cancel)
                assert scope.cancelled_caught
                await there.guest.process.wait()
                await passing.pass_more(4)

            there = await mover.end(incoming=True)
            done = await moving.move(here, there)
            assert done.target_runs
            await passing.pass_more()
            await passing.check(there.guest, moves=8)
        assert await there.guest.kernel_complaints() == []
