"""The real libvfio-user, where it is installed; the tests that need it say why they skip."""

from __future__ import annotations

import pytest

from vfio_user_virtio.libvfio_user import Library, LibraryError, load


@pytest.fixture(scope="session")
def library() -> Library:
    try:
        return load()
    except LibraryError as error:
        pytest.skip(str(error))
