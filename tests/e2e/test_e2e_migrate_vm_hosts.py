"""A running guest goes to another host and back, as far as one machine can show that.

The other host is a network namespace.  The QEMUs meet by TCP, and the far one's sockets are reached
as ssh forwards them, by bytes alone.
"""

from __future__ import annotations

import json
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

import pytest
import trio

from tests.e2e import moving, traffic
from tests.e2e.loading import check_load, start_load

if TYPE_CHECKING:
    from pathlib import Path

    from tests.testbed.bed import Bed
    from tests.testbed.netns import Netns

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


async def test_to_another_host_and_back(bed: Bed, netns: Netns, tmp_path: Path) -> None:
    """Both moves are made from the first host: what is far is first the target, then the source."""
    async with AsyncExitStack() as stack:
        enter = stack.enter_async_context
        mover = await enter(moving.open_mover(bed, netns, tmp_path))
        other = await enter(moving.open_other_host(bed, netns))
        first = await mover.end(incoming=False, host=netns)
        await start_load(first.guest)
        passing = await enter(moving.running_traffic(netns, first.guest))

        far = await mover.end(incoming=True, host=other)
        async with far.forwarded() as qtest:
            refused = await run(first, far)
            assert "forward a socket for its test protocol, too" in refused, refused
            await passing.pass_more(4)

            there = ("--to-qtest", qtest, "--channel", f"tcp:{moving.FAR}:4444", "--json")
            assert json.loads(await run(first, far, *there))["failed"] == []
            await passing.pass_more(4)

            last = await mover.end(incoming=True, host=netns)
            back = ("--from-qtest", qtest, "--channel", f"tcp:{traffic.HOST}:4444", "--json")
            assert json.loads(await run(far, last, *back))["failed"] == []
            await passing.pass_more(4)
        assert await far.guest.process.wait() == 0
        assert not (far.folder / "qtest").exists(), "QEMU takes its own socket along"

        await check_load(last.guest)
        await passing.check(last.guest, moves=2)
        assert await last.guest.kernel_complaints() == []


async def run(source: moving.End, target: moving.End, *options: str) -> str:
    """What the command says."""
    done = await trio.run_process(
        moving.command(source, target, *options),
        capture_stdout=True,
        capture_stderr=True,
        check=False,
    )
    print(done.stderr.decode())
    return (done.stdout or done.stderr).decode()
