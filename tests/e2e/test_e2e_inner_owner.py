"""Served PFs as an inner host's hardware: judged by Linux's driver first, then driven by ours."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import attrs
import pytest

from tests.e2e.inner_cases import report_cases
from tests.testbed.inner_host import boot_inner_host
from tests.testbed.inner_machine import InnerIommu, InnerMachine, Kernel
from tests.testbed.server_process import serve

if TYPE_CHECKING:
    from pathlib import Path

    from tests.testbed.bed import Bed

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

MACHINES: Final = (
    InnerMachine(kernel=Kernel.OWN, iommu=InnerIommu.INTEL),
    InnerMachine(kernel=Kernel.DEBIAN, iommu=InnerIommu.INTEL),
)
LINUX_COMMANDS: Final = ("LIST_QUERY", "LIST_USE")
CONFIG: Final = """
[[owner]]
name = "first"
pf = {{ socket_path = "{folder}/pf1" }}
[[owner.member]]
socket_path = "{folder}/vf1"
[[owner.member]]
socket_path = "{folder}/vf1-target"
[[owner.member]]
socket_path = "{folder}/vf1-peer"
[[owner]]
name = "second"
pf = {{ socket_path = "{folder}/pf2" }}
[[owner.member]]
socket_path = "{folder}/vf2"
"""
SOCKETS: Final = ("vf1", "pf1", "vf2", "pf2", "vf1-target", "vf1-peer")


@pytest.mark.parametrize("machine", MACHINES, ids=lambda machine: machine.name)
async def test_owner(
    bed: Bed, tmp_path: Path, machine: InnerMachine, subtests: pytest.Subtests
) -> None:
    (tmp_path / "config.toml").write_text(CONFIG.format(folder=tmp_path))
    machine = attrs.evolve(machine, sockets=tuple(tmp_path / name for name in SOCKETS))
    async with (
        serve(
            tmp_path, "--log-level", "debug", "--config", str(tmp_path / "config.toml")
        ) as server,
        boot_inner_host(bed, machine, tmp_path / "host") as host,
    ):
        said = server.log.read_text()
        with subtests.test("Linux's driver takes the PF and asks it what it can do"):
            assert "first-pf: the driver is ready: " in said
            assert " ADMIN_VQ" in said
            for name in LINUX_COMMANDS:
                assert f"{name} of group 1, member 0: OK" in said
            assert "EINVAL" not in said
        for address in machine.function_addresses:
            await host.bind(address)
        cases = await host.pytest("tests/inner/owner", seconds=300)
        complaints = await host.guest.kernel_complaints()
    report_cases(cases, machine.ways, subtests)
    assert complaints == []
