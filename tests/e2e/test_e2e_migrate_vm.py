"""A running Linux guest goes to another stock QEMU and another server, under traffic."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import attrs
import pytest
import trio

from tests.e2e import moving
from vfio_user_virtio.errors import HostError

if TYPE_CHECKING:
    from pathlib import Path

    from tests.testbed.bed import Bed
    from tests.testbed.machine import Machine
    from tests.testbed.netns import Netns

MOST_LOST = 6
"""Pings that may go to the source while it is stopped, on a machine that is busy."""

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


@pytest.mark.parametrize(
    ("machine", "options"),
    [
        pytest.param(moving.MACHINE, (), id="msix"),
        pytest.param(attrs.evolve(moving.MACHINE, cpus=2), ("--queue-pairs", "2"), id="multiqueue"),
        pytest.param(attrs.evolve(moving.MACHINE, append="pci=nomsi"), (), id="intx"),
    ],
)
async def test_there_and_back(
    machine: Machine, options: tuple[str, ...], bed: Bed, netns: Netns, tmp_path: Path
) -> None:
    """Two moves, the second from where the first has brought the guest."""
    async with moving.open_mover(bed, netns, tmp_path, *options, machine=machine) as mover:
        here = await mover.end(incoming=False)
        async with moving.running_traffic(netns, here.guest) as passing:
            for _ in range(2):
                there = await mover.end(incoming=True)
                done = await trio.run_process(
                    moving.command(here, there, "--json"), capture_stdout=True
                )
                report = json.loads(done.stdout)
                assert report["failed"] == []
                print(report["devices"], report["downtime_seconds"], report["stopped_seconds"])
                assert await here.guest.process.wait() == 0, "the source has ended"
                await passing.pass_more(4)
                here = there
            sent, lost = await passing.check(here.guest)
            print(f"{sent} pings, {lost} lost")
            assert sent > 10
            assert lost <= MOST_LOST
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
                await passing.pass_more(2)

            for step in ("pre-copy", "switch over", "load devices"):
                with trio.CancelScope() as scope:

                    def cancel(name: str, at: str = step, scope: trio.CancelScope = scope) -> None:
                        if name == at:
                            scope.cancel()

                    there = await mover.end(incoming=True)
                    await moving.move(here, there, cancel)
                assert scope.cancelled_caught
                await there.guest.process.wait()
                await passing.pass_more(2)

            there = await mover.end(incoming=True)
            done = await moving.move(here, there, lambda _: None)
            assert done.target_runs
            await passing.pass_more()
            await passing.check(there.guest)
        assert await there.guest.kernel_complaints() == []
