"""A guest under traffic moves between physical VFs: of one owner, and of two."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.inner.physical_rig import physical_rig

if TYPE_CHECKING:
    from tests.inner.conftest import InnerFacts


@pytest.mark.parametrize("servers", ["ab", "ac"], ids=["one owner", "two owners"])
async def test_under_traffic(inner: InnerFacts, way: str, servers: str) -> None:
    async with physical_rig(inner, way, servers) as made:
        rig = made.rig
        await rig.start()
        for precopy in (True, False):
            for _ in range(2):
                migration = await rig.move(precopy=precopy)
                assert migration.precopy == precopy
                await rig.traffic.goes_on(rig.here)
        await rig.finish()
        assert len(rig.host.announced) == 4
