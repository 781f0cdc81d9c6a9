"""A running Linux guest goes to another stock QEMU and another server, under traffic."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import trio

from tests.e2e import moving
from vfio_user_virtio.errors import HostError

if TYPE_CHECKING:
    from pathlib import Path

    from tests.testbed.bed import Bed
    from tests.testbed.netns import Netns

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


async def test_there_and_back(bed: Bed, netns: Netns, tmp_path: Path) -> None:
    async with moving.open_mover(bed, netns, tmp_path) as mover:
        here = await mover.end(incoming=False)
        async with moving.running_traffic(netns, here.guest) as passing:
            await passing.pass_more()
            for _ in range(2):
                there = await mover.end(incoming=True)
                done = await trio.run_process(
                    moving.command(here, there, "--json"), capture_stdout=True
                )
                report = json.loads(done.stdout)
                assert report["failed"] == []
                assert await here.guest.process.wait() == 0, "the source has ended"
                await passing.pass_more()
                here = there
            sent, lost = await passing.check(here.guest)
            assert (sent > 10, lost) == (True, 0)
        assert await here.guest.kernel_complaints() == []


class Injected(HostError):
    """A step that was made to fail."""


async def test_the_source_runs_on_whatever_fails(bed: Bed, netns: Netns, tmp_path: Path) -> None:
    """Failures, then cancellations, at steps of each kind; and after all that the guest moves."""
    async with moving.open_mover(bed, netns, tmp_path) as mover:
        here = await mover.end(incoming=False)
        async with moving.running_traffic(netns, here.guest) as passing:
            for step in ("log", "mark pages", "restore PCI state", "run"):

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
