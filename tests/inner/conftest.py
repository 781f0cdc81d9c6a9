"""Tests that run inside an inner host; `tests/e2e/test_e2e_inner_host.py` boots and reports.

Outside they are not collected: they want real kernel VFIO, and functions bound to it.  What they
run on is told by an environment variable that only the inner host sets.
"""

from __future__ import annotations

import json
import os
from typing import Final

import attrs
import pytest

FACTS: Final = os.environ.get("INNER_HOST")

collect_ignore_glob = [] if FACTS else ["test_*.py"]


@attrs.frozen
class InnerFacts:
    """The host that a test runs on.

    `ways` into VFIO are "group", "cdev" or "noiommu"; `pf` and `vfs` are PCI addresses of QEMU's
    SR-IOV device, `functions` those of the vfio-user functions; VFs and functions are bound to
    vfio-pci.
    """

    kernel: str
    iommu: str
    ways: tuple[str, ...]
    pf: str | None
    vfs: tuple[str, ...]
    functions: tuple[str, ...]


@pytest.fixture(scope="session")
def inner() -> InnerFacts:
    facts = json.loads(FACTS or "{}")
    return InnerFacts(
        kernel=facts["kernel"],
        iommu=facts["iommu"],
        ways=tuple(facts["ways"]),
        pf=facts["pf"],
        vfs=tuple(facts["vfs"]),
        functions=tuple(facts["functions"]),
    )


@pytest.fixture
def best_way(inner: InnerFacts) -> str:
    """The way into VFIO that is taken where there is a choice."""
    return inner.ways[-1]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that asks for a `way` runs once for each that this host offers."""
    if "way" in metafunc.fixturenames:
        metafunc.parametrize("way", json.loads(FACTS or "{}").get("ways", ()))
