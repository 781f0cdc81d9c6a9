"""Devices of several servers: each can be named, although all call theirs the same."""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

import pytest

from tests.testbed.server_process import serve
from vfio_user_virtio.errors import HostError
from vfio_user_virtio_server.migrate_vm import Served
from vfio_user_virtio_server.vm.control import connect_server

if TYPE_CHECKING:
    from pathlib import Path


async def test_a_device_of_two_servers(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        servers = []
        for name in ("one", "two"):
            folder = tmp_path / name
            folder.mkdir()
            control = str(folder / "control")
            options = ("--socket-path", str(folder / "vf.sock"), "--control-path", control)
            await stack.enter_async_context(serve(folder, *options))
            servers.append(await stack.enter_async_context(connect_server(control)))
        both = Served(servers, None)
        for number, server in enumerate(servers, 1):
            assert (await both.named(f"{number}/device")).server is server
            assert (await Served([server], None).named("device")).server is server
        with pytest.raises(HostError, match="called device: 1/device, 2/device; name each"):
            await both.named("device")
        with pytest.raises(HostError, match="called 3/device: none"):
            await both.named("3/device")
