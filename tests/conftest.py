"""Fixtures of the test bed, the logs of a failed test's processes, hypothesis made repeatable."""

from __future__ import annotations

import contextlib
import gc
import os
from pathlib import Path
from typing import TYPE_CHECKING, Final

import hypothesis
import pytest

from tests.testbed.bed import Bed, TestbedMissing
from tests.testbed.engines import ENGINES, LIBVFIO_USER, departure, libvfio_user_sessions
from tests.testbed.netns import NoNamespaces, open_netns, unshare_options
from vfio_user_virtio.libvfio_user import Library, LibraryMissing, load
from vfio_user_virtio.testing import loopback

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Generator

    from tests.testbed.netns import Netns

hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.load_profile("repeatable")
"""The same examples every time and everywhere, however slow the machine."""

LOG_BYTES: Final = 6000
"""How much of the end of each log a failed test shows."""


def pytest_configure() -> None:
    """What the system lacks, such as `ip`, is taken from the bed."""
    with contextlib.suppress(TestbedMissing):
        os.environ["PATH"] += f":{Bed.find().bin}"


def pytest_collection_finish() -> None:
    """What is there now stays: collections from here on need not look at it."""
    gc.collect()
    gc.freeze()


def pytest_runtest_setup() -> None:
    """A test starts without another's garbage, so that what it counts (descriptors) is its own."""
    gc.collect()


@pytest.fixture(scope="session")
def bed() -> Bed:
    """The test bed; a test that needs it fails without it."""
    return Bed.find()


@pytest.fixture(scope="session")
def namespaces() -> None:
    """Skips where this user may have no network namespace; never in CI."""
    try:
        unshare_options()
    except NoNamespaces as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def library() -> Library:
    """The real libvfio-user; skips where it is not installed, never for one that does not fit."""
    try:
        return load()
    except LibraryMissing as error:
        pytest.skip(str(error))


@pytest.fixture
async def netns(bed: Bed, namespaces: None) -> AsyncIterator[Netns]:
    """A network namespace of the test's own."""
    async with open_netns(bed) as opened:
        yield opened


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Adds the end of every log in the test's folder to the report of its failure."""
    report = yield
    folder = getattr(item, "funcargs", {}).get("tmp_path")
    if report.failed and isinstance(folder, Path):
        for path in sorted(folder.rglob("*.log")):
            text = path.read_bytes()[-LOG_BYTES:].decode(errors="replace")
            report.sections.append((str(path.relative_to(folder)), text))
    return report


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which engine serves; a test that takes it runs once with each, if they are there."""
    name: str = request.param
    if name == LIBVFIO_USER:
        library: Library = request.getfixturevalue("library")
        monkeypatch.setattr(loopback, "make_session", libvfio_user_sessions(library))
        if found := departure(request.node.name):
            mark = pytest.mark.xfail(reason=found.why, run=found.run, strict=True)
            request.applymarker(mark)
    return name
