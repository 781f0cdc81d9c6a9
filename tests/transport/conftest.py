"""What a client of these tests has to send along."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from tests.transport.payloads import sealed

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def memory() -> Iterator[int]:
    """A memfd as QEMU would send it: sealed, 8 KiB."""
    fd = sealed()
    yield fd
    os.close(fd)


@pytest.fixture
def eventfd() -> Iterator[int]:
    fd = os.eventfd(0)
    yield fd
    os.close(fd)
