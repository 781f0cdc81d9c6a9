"""QEMU inside the inner host, with a Linux guest on a physical VF that our server gives it; and two
QEMUs, between which such a guest is moved.

By the VF's own node; by group it is the same but for `NESTED=group`, and another minute.  The guest
that stays has a VF of QEMU's, which has no owner; the one that moves has two of ours, each with a
PF of its own, whose networks are one.

The guests are booted outside and taken in (`nested_machine`).  Their memory is made of huge pages,
or each page would be a message from the inner host's IOMMU to our server: seven seconds for 128
MiB.
"""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Final

import pytest

from tests.inner.nested.nested_machine import SAVED_FOLDER, save_guest
from tests.testbed.bed import cache_root
from tests.testbed.inner_host import boot_inner_host
from tests.testbed.inner_machine import READ_ONLY, InnerMachine
from tests.testbed.server_process import serve

if TYPE_CHECKING:
    from pathlib import Path

    from tests.testbed.bed import Bed
    from tests.testbed.inner_host import InnerHost

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

PEER: Final = "10.77.0.1"
OTHER_PEER: Final = "10.78.0.1"
CONFIG: Final = """
[[owner]]
uplink = "datagram:{folder}/one,{folder}/two"
pf = {{ socket_path = "{folder}/pf1" }}
[[owner.member]]
socket_path = "{folder}/vf1"
mac = "52:54:00:00:02:01"
[[owner.member]]
socket_path = "{folder}/peer"
mac = "52:54:00:00:02:99"
[[owner]]
uplink = "datagram:{folder}/two,{folder}/one"
pf = {{ socket_path = "{folder}/pf2" }}
[[owner.member]]
socket_path = "{folder}/vf2"
mac = "52:54:00:00:02:02"
[[owner]]
[[owner.member]]
socket_path = "{folder}/outside"
mac = "52:54:00:00:02:03"
"""
SOCKETS: Final = ("pf1", "vf1", "pf2", "vf2", "peer")
MOUNT_SAVED: Final = f"""
mkdir {SAVED_FOLDER}
mount -t 9p -o trans=virtio,version=9p2000.L,ro,msize=512000 saved {SAVED_FOLDER}
"""
HUGE_PAGES: Final = "/sys/kernel/mm/transparent_hugepage/shmem_enabled"
LOGS: Final = "tail -n 40 $(find /run/pytest-of-* -name '*.log'); dmesg"


async def address(host: InnerHost, function: str, number: str) -> None:
    """The host's own driver for it, and an answer to whoever asks for that address."""
    await host.bind(function, "virtio-pci")
    await host.guest.run(
        f"device=$(ls /sys/bus/pci/devices/{function}/virtio*/net)\n"
        f"ip addr add {number}/24 dev $device; ip link set $device up"
    )


async def test_nested(bed: Bed, tmp_path: Path, subtests: pytest.Subtests) -> None:
    config = tmp_path / "config.toml"
    config.write_text(CONFIG.format(folder=tmp_path))
    sockets = tuple(tmp_path / name for name in SOCKETS)
    saved = tmp_path / "saved"
    saved.mkdir()
    share = ("-virtfs", f"local,path={saved},mount_tag=saved,{READ_ONLY}")
    machine = InnerMachine(memory_mib=2048, cpus=2, sockets=sockets, devices=share)
    async with serve(tmp_path, "--config", str(config)), AsyncExitStack() as stack:
        await save_guest(bed, tmp_path / "outside", tmp_path / "guest", saved)
        host = await stack.enter_async_context(boot_inner_host(bed, machine, tmp_path / "host"))
        await host.guest.run(MOUNT_SAVED)
        await host.guest.run(f"echo always >{HUGE_PAGES}")
        await host.enable_vfs()
        await address(host, machine.vf_addresses[1], PEER)
        *functions, peer = machine.function_addresses
        for function in functions:
            await host.bind(function)
        await address(host, peer, OTHER_PEER)
        environment = {
            "NESTED": "cdev",
            "PEER": PEER,
            "OTHER_PEER": OTHER_PEER,
            "XDG_CACHE_HOME": str(cache_root().parent),
        }
        async with host.vfs_cabled():
            cases = await host.pytest("tests/inner/nested", seconds=700, env=environment)
            said = await host.guest.run(LOGS)
        complaints = await host.guest.kernel_complaints()
    assert len(cases) == 2
    for case in cases:
        with subtests.test(case.name):
            assert case.outcome == "passed", f"{case.text}\n{said}"
    assert complaints == []
