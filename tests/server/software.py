"""Configuration that is of the software model only, as a type checker wants to know it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vfio_user_virtio_server.config import OwnerConfig

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vfio_user_virtio_server.config import Configured


def software(owners: Sequence[Configured]) -> tuple[OwnerConfig, ...]:
    """`owners`, none of which is physical."""
    found = tuple(owner for owner in owners if isinstance(owner, OwnerConfig))
    assert len(found) == len(owners)
    return found
