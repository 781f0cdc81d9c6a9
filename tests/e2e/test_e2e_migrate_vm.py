"""A running Linux guest goes to another stock QEMU and another server, under traffic."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import trio

from tests.e2e import moving

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
            assert lost == 0
        assert await here.guest.kernel_complaints() == []
