"""A physical VF and its PF, in an inner host: what `physical_function`, `physical_memory` and
`physical_commands` measure there, in a machine of its own each.

The VFs are QEMU's emulated ones.  The PF is our owner model, served by a server process outside.
Memory larger than this machine can spare is left out, and that is said.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tests.bench.contenders import running
from tests.bench.inside import MARK, publish_all
from tests.testbed.bed import Bed
from tests.testbed.inner_host import boot_inner_host
from tests.testbed.inner_machine import InnerMachine
from tests.testbed.server_process import COMMAND

if TYPE_CHECKING:
    from tests.bench.effort import Effort
    from tests.bench.figures import Publish

WAYS: Final = ("cdev", "group")
PAIRED_VFS: Final = 6
HOST_MIB: Final = 1536
"""What an inner host wants beside the memory that it maps."""
SPARE_MIB: Final = 4096
"""What is left to others on this machine."""
SECONDS: Final = 900
CONFIG: Final = """
[[owner]]
uplink = "none"
pf = {{ socket_path = "{folder}/pf.sock" }}
[[owner.member]]
socket_path = "{folder}/vf.sock"
"""


async def measure_packets(effort: Effort, publish: Publish) -> None:
    machine = InnerMachine(vfs=PAIRED_VFS)
    for way in effort.ways:
        await run_inside(
            machine, publish, "physical_function", way, effort.blocks, effort.vf_packets
        )


async def measure_memory(effort: Effort, publish: Publish) -> None:
    sizes = [mib for mib in effort.guest_mib if enough_for(mib)]
    if missing := set(effort.guest_mib) - set(sizes):
        print(f"not measured, for want of memory: {sorted(missing)} MiB")
    if sizes:
        # the first is mapped twice, once for the peer
        machine = InnerMachine(memory_mib=max(2 * sizes[0], *sizes) + HOST_MIB)
        await run_inside(machine, publish, "physical_memory", WAYS[0], *sizes)
        for way in effort.ways[1:]:
            await run_inside(machine, publish, "physical_memory", way, sizes[0])


async def measure_commands(effort: Effort, publish: Publish) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = folder / "config.toml"
        config.write_text(CONFIG.format(folder=folder))
        pf = folder / "pf.sock"
        with running(pf, COMMAND, "serve", "--config", str(config)) as server:
            (await server.connect(pf)).close()  # it is there
            machine = InnerMachine(vfs=0, sockets=(pf,))
            address = machine.function_addresses[0]
            for way in effort.ways:
                await run_inside(
                    *(machine, publish, "physical_commands", address, way),
                    *(effort.blocks, effort.commands),
                )


async def run_inside(machine: InnerMachine, publish: Publish, program: str, *argv: object) -> None:
    """One of the programs beside this, in a new inner host."""
    with tempfile.TemporaryDirectory() as folder:
        async with boot_inner_host(Bed.find(), machine, Path(folder)) as host:
            if machine.vfs:
                await host.enable_vfs()
            for address in machine.function_addresses:
                await host.bind(address)
            async with host.vfs_cabled():
                words = ("-m", f"tests.bench.{program}", *map(str, argv))
                output = await host.python(*words, seconds=SECONDS)
    publish_all(output, publish)
    for line in output.splitlines():
        if not line.startswith(MARK):
            print(line)


def enough_for(mib: int) -> bool:
    """Whether this machine has room for an inner host that maps so much."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    (available,) = [line.split()[1] for line in lines if line.startswith("MemAvailable")]
    return int(available) // 1024 >= mib + HOST_MIB + SPARE_MIB
