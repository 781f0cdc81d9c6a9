"""What a guest can make its member write to the log, and how often."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from tests.backends.member_rig import MAC_A, configs, guests
from vfio_user_virtio.limits import MAX_GUEST_LOG_LINES

if TYPE_CHECKING:
    import pytest


async def test_a_guest_that_resets_over_and_over_fills_no_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "vfio_user_virtio.backends.software.member")
    async with guests(*configs(MAC_A)) as (guest,):
        for _ in range(MAX_GUEST_LOG_LINES + 10):
            driver = guest.driver()
            await driver.start()
            await driver.stop()
    told = [record.message for record in caplog.records if "the driver is ready" in record.message]
    assert len(told) == MAX_GUEST_LOG_LINES
    assert "MRG_RXBUF" in told[0]
    assert told[-1].endswith("(no more of this until the next session)")
