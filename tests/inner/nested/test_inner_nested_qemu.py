"""A Linux guest of stock QEMU, on a physical VF behind our server: what the project is for.

VF 1 is served here, inside the inner host.  VF 2 has the kernel's own driver and an address there;
the two are cabled outside.  So an echo request goes from the guest's driver into the VF's ring in
guest memory, by the IOMMU to the VF, out of the inner host, in at VF 2, and the answer back.
"""

from __future__ import annotations

import logging
import os
import socket
from typing import TYPE_CHECKING

from tests.inner.nested.nested_machine import (
    ARRIVING,
    COMMAND_SECONDS,
    MEMORY_MIB,
    arrive,
    nested_machine,
)
from tests.testbed.bed import Bed
from tests.testbed.guest import start
from vfio_user_virtio.backends.vfio.function import VfFunction
from vfio_user_virtio.backends.vfio.opening import OpenOptions, Way, open_function
from vfio_user_virtio.backends.vfio.sysfs import PciAddress
from vfio_user_virtio.testing.loopback import ungrouped_nursery
from vfio_user_virtio.transport.listener import serve_listener

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

    from tests.inner.conftest import InnerFacts
    from vfio_user_virtio.transport.listener import Serving

PEER = os.environ.get("PEER", "")
GUEST = "10.77.0.2"
COUNT = 20
BOOT_MESSAGES = {"DMA_MAP", "DEVICE_SET_IRQS", "REGION_WRITE", "REGION_READ", "VERSION"}


async def test_linux_pings_through_the_vf(
    inner: InnerFacts,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    bed = Bed.find()
    path = tmp_path / "vf.sock"
    sessions: list[Serving] = []
    way = Way[os.environ["NESTED"].upper()]
    function = VfFunction(open_function(PciAddress.parse(inner.vfs[0]), OpenOptions(way=way)))
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen()
        async with ungrouped_nursery() as nursery:
            nursery.start_soon(
                lambda: serve_listener(listener, function, on_session=sessions.append)
            )
            machine = nested_machine(bed, path, *ARRIVING)
            async with start(bed, machine, tmp_path / "guest") as guest:
                await arrive(guest, GUEST)
                await guest.run(f"until ping -c 1 -W 1 {PEER}; do :; done", seconds=COMMAND_SECONDS)
                (session,) = sessions
                before = dict(session.statistics().commands)
                told = await guest.run(
                    f"ping -c {COUNT} -i 0.1 -W 5 {PEER}", seconds=COMMAND_SECONDS
                )
                after = dict(session.statistics().commands)
                interrupts = await guest.run("cat /proc/interrupts")
                complaints = await guest.kernel_complaints()
                assert function.memory.pinned_bytes >= MEMORY_MIB << 20
            nursery.cancel_scope.cancel()
    function.close()
    assert f"{COUNT} packets transmitted, {COUNT} packets received, 0% packet loss" in told
    assert after == before, "packets made messages"
    assert before.keys() >= BOOT_MESSAGES
    assert "virtio0-input.0" in interrupts
    assert complaints == []
    assert "refused" not in caplog.text
    assert function.memory.pinned_bytes == 0
