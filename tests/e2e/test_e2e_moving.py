"""What the tests of moved guests rely on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.e2e import moving, traffic

if TYPE_CHECKING:
    from tests.testbed.netns import Netns

pytestmark = pytest.mark.e2e


async def test_the_bridge_is_the_same_neighbour_with_each_new_port(netns: Netns) -> None:
    """New connections of a guest once hung after a move, as its neighbour had another address."""
    await moving.add_bridge(netns, "br0", traffic.HOST)
    for port, lowest in enumerate(("02:ff:00:00:00:00", "02:00:00:00:00:01")):
        await netns.add_tap(f"tap{port}")
        await netns.run("ip", "link", "set", f"tap{port}", "address", lowest, "master", "br0")
        assert traffic.HOST_MAC in await netns.run("ip", "link", "show", "br0")
