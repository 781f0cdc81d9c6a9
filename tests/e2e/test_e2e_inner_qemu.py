"""QEMU inside the inner host, with a Linux guest on a physical VF that our server gives it.

By the VF's own node; by group it is the same but for `NESTED=group`, and another minute.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import pytest

from tests.testbed.bed import cache_root
from tests.testbed.inner_host import boot_inner_host
from tests.testbed.inner_machine import InnerMachine

if TYPE_CHECKING:
    from pathlib import Path

    from tests.testbed.bed import Bed

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

PEER: Final = "10.77.0.1"


async def test_nested(bed: Bed, tmp_path: Path, subtests: pytest.Subtests) -> None:
    machine = InnerMachine(memory_mib=2048, cpus=2)
    async with boot_inner_host(bed, machine, tmp_path) as host:
        await host.enable_vfs()
        peer = machine.vf_addresses[1]
        await host.bind(peer, "virtio-pci")
        # an answer to each request, whichever of the host's devices has the address
        await host.guest.run(
            f"device=$(ls /sys/bus/pci/devices/{peer}/virtio*/net)\n"
            f"ip addr add {PEER}/24 dev $device; ip link set $device up"
        )
        environment = {"NESTED": "cdev", "PEER": PEER, "XDG_CACHE_HOME": str(cache_root().parent)}
        async with host.vfs_cabled():
            cases = await host.pytest("tests/inner/nested", seconds=500, env=environment)
            said = await host.guest.run("tail -n 40 /host/run/pytest-of-*/*/*/guest/*.log; dmesg")
        complaints = await host.guest.kernel_complaints()
    assert len(cases) == 1
    for case in cases:
        with subtests.test(case.name):
            assert case.outcome == "passed", f"{case.text}\n{said}"
    assert complaints == []
