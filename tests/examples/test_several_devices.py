"""The file with several devices: what it describes is what is served."""

from __future__ import annotations

import json
import os
import tomllib
from typing import TYPE_CHECKING

import pytest
import trio

from tests.examples.example_process import EXAMPLES
from tests.testbed.server_process import COMMAND, serve

if TYPE_CHECKING:
    from pathlib import Path

    from tests.testbed.netns import Netns

FILE = EXAMPLES / "several_devices.toml"


@pytest.mark.slow
async def test_devices_are_those_of_the_file(netns: Netns, tmp_path: Path) -> None:
    def wrap(argv: list[str]) -> list[str]:
        return netns.wrap(["env", f"--chdir={tmp_path}", *argv])

    await netns.add_tap("vnet0")
    owners = tomllib.loads(FILE.read_text())["owner"]
    members = [member for owner in owners for member in owner["member"]]
    async with serve(tmp_path, "--config", str(FILE), wrap=wrap) as server:
        assert (tmp_path / "lab-1.pcapng").is_file()
        for member in members:
            facts = await probe(tmp_path / member["socket_path"])
            assert facts["net"]["mac"] == member["mac"]
            assert facts["net"]["mtu"] == member.get("mtu")
            assert (facts["net"]["max_virtqueue_pairs"] or 1) == member.get("queue_pairs", 1)
            offered = facts["virtio"]["features_offered"]
            assert isinstance(offered, list)
            for name, on in member.get("features", {}).items():
                assert (name in offered) == on
        assert await server.stop() == 0
    left = [name for name in os.listdir(tmp_path) if name.endswith(".sock")]
    assert left == [], "what the server made, it removes"


async def probe(path: Path) -> dict[str, dict[str, object]]:
    argv = [COMMAND, "probe", "--json", "--socket-path", str(path)]
    done = await trio.run_process(argv, capture_stdout=True)
    facts: dict[str, dict[str, object]] = json.loads(done.stdout)
    return facts
