"""Bindings of libvfio-user, for devices of one's own, and the engine that serves ours behind it.

`load` finds the library, `Context` is a device behind it; ``examples/libvfio_user_device.py`` is a
whole one.  The engine is `vfio_user_virtio.libvfio_user.session`, whose head has a table of how it
differs from the native one, which stays the default.
"""

from __future__ import annotations

from vfio_user_virtio.libvfio_user.callbacks import Migration
from vfio_user_virtio.libvfio_user.context import Context, DmaRegion
from vfio_user_virtio.libvfio_user.declarations import (
    CapabilityFlag,
    Irq,
    LogLevel,
    MigrationState,
    PciType,
    Protection,
    Region,
    RegionFlag,
    ResetKind,
)
from vfio_user_virtio.libvfio_user.library import Library, LibraryError, LibraryMissing, load
from vfio_user_virtio.libvfio_user.scatter import ScatterList

__all__ = [
    "CapabilityFlag",
    "Context",
    "DmaRegion",
    "Irq",
    "Library",
    "LibraryError",
    "LibraryMissing",
    "LogLevel",
    "Migration",
    "MigrationState",
    "PciType",
    "Protection",
    "Region",
    "RegionFlag",
    "ResetKind",
    "ScatterList",
    "load",
]
