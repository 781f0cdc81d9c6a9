"""Administration commands to a PF that another process serves, without a machine in between.

It is what `physical_commands` measures inside an inner host, with only what is ours: our owner's
ring, in memory that the server maps, its doorbell a message on a socket, its interrupt an eventfd.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from tests.bench.contenders import running, session
from tests.bench.figures import NATIVE
from tests.bench.physical import CONFIG
from tests.bench.physical_commands import IN_PROCESS, compare, model
from tests.testbed.server_process import COMMAND
from vfio_user_virtio.backends.vfio.owner import owned

if TYPE_CHECKING:
    from tests.bench.effort import Effort
    from tests.bench.figures import Publish
    from vfio_user_virtio.migration.admin_client import AdminQueue


async def measure(effort: Effort, publish: Publish) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = folder / "config.toml"
        config.write_text(CONFIG.format(folder=folder))
        argv = (COMMAND, "serve", "--config", str(config))
        with running(folder / "pf.sock", *argv) as server:
            async with session(server) as client, owned(client, "pf") as owner:
                queues: dict[str, AdminQueue] = {NATIVE: owner, IN_PROCESS: model()}
                await compare(queues, effort.blocks, effort.commands, "", publish)
