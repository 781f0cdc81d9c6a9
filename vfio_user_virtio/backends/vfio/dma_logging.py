"""What a physical function has written to guest memory, for a guest that is migrated.

Two sources.  An IOMMU that tracks dirty pages is asked, mapping by mapping, for what a report
covers: a range with a gap in it would lose what comes after the gap (Linux, iommufd).  Any other
IOMMU knows nothing, and then everything that the device can write counts as written, each time: the
guest can be migrated, but rounds of copying do not converge, so that the last one, while it stands
still, copies all of its memory.  That is told once, when logging starts.

What was written to memory that is unmapped is read before it goes, and kept.  So all of it ends in
one log (`DirtyLog`), and a report clears just what it told.

The calls are ioctls, made while other sessions wait: what they read is as large as a message holds.

Source: vfio-user, VFIO_USER_DEVICE_FEATURE, DMA logging; Linux, include/uapi/linux/iommufd.h,
IOMMU_HWPT_GET_DIRTY_BITMAP.
"""

from __future__ import annotations

import errno
import logging
from typing import TYPE_CHECKING, Final

from vfio_user_virtio import limits
from vfio_user_virtio.backends.vfio.kernel import KernelRefusal
from vfio_user_virtio.device import DmaAccess
from vfio_user_virtio.errors import ClientError
from vfio_user_virtio.memory.dirty_log import DirtyLog

if TYPE_CHECKING:
    from vfio_user_virtio.backends.vfio.address_space import IoAddressSpace
    from vfio_user_virtio.backends.vfio.dma import ClientMapping, ClientMemory
    from vfio_user_virtio.device import LoggingReport, LoggingStart

_log: Final = logging.getLogger(__name__)


class VfLogging:
    """What the function `name` has written to `memory`, which is mapped in `space`."""

    def __init__(self, name: str, memory: ClientMemory, space: IoAddressSpace) -> None:
        self._name = name
        self._memory = memory
        self._space = space
        self._page_size: Final = max(limits.PAGE_SIZE, space.limits.page_size)
        self._dirty: DirtyLog | None = None
        memory.observer = self

    @property
    def active(self) -> bool:
        """Whether writes are logged."""
        return self._dirty is not None

    @property
    def exact(self) -> bool:
        """Whether the IOMMU tells single pages."""
        return self._space.tracks_dirty

    def start_logging(self, start: LoggingStart) -> None:
        """Log writes from now on.  Raises ClientError: EINVAL if that is being done, or what the
        kernel says."""
        if self._dirty is not None:
            raise ClientError(
                errno.EINVAL, f"{self._name}: DMA logging is on; stop it before it is started again"
            )
        if self._space.tracks_dirty:
            try:
                self._space.set_dirty_tracking(True)
            except KernelRefusal as error:
                raise ClientError(error.errno, f"{self._name}: {error}") from error
        else:
            _log.warning(
                "%s: the host's IOMMU cannot tell which pages a device has written, so all of the "
                "guest's memory counts as written all the time: migration ends with a copy of it "
                "while the guest stands still",
                self._name,
            )
        self._dirty = DirtyLog(self._page_size, start.ranges)

    def stop_logging(self) -> None:
        """Log no more, and forget what was logged; nothing if that has been done."""
        if self._dirty is None:
            return
        self._dirty = None
        if self._space.tracks_dirty:
            try:
                self._space.set_dirty_tracking(False)
            except KernelRefusal as error:  # it costs a little, and ends with the device
                _log.warning("%s: %s", self._name, error)

    def report_logging(self, report: LoggingReport) -> bytes:
        """The bitmap of what was written since the last report of it; see `DirtyLog`.

        Raises ClientError: EINVAL if nothing is logged, or what the kernel says.
        """
        dirty = self._dirty
        if dirty is None:
            raise ClientError(
                errno.EINVAL, f"{self._name}: DMA logging is off; start it, then ask for reports"
            )
        start, end = report.iova, report.iova + report.length
        try:
            for mapping in self._memory.overlapping(start, end):
                low = max(mapping.start, start - start % self._page_size)
                high = min(mapping.end, end + -end % self._page_size)
                self._collect(dirty, mapping, low, high, clear=True)
        except KernelRefusal as error:
            raise ClientError(error.errno, f"{self._name}: {error}") from error
        return dirty.report_and_clear(report.iova, report.length, report.page_size)

    def mapping_goes(self, mapping: ClientMapping) -> None:
        """`UnmapObserver`: the last chance to learn what was written there."""
        if self._dirty is not None:
            self._collect(self._dirty, mapping, mapping.start, mapping.end, clear=False)

    def _collect(
        self, dirty: DirtyLog, mapping: ClientMapping, start: int, end: int, *, clear: bool
    ) -> None:
        if not mapping.pinned or not mapping.access & DmaAccess.WRITE:
            return
        if self._space.tracks_dirty:
            page_size = self._page_size
            bitmap = self._space.dirty_bitmap(start, end - start, page_size, clear=clear)
            dirty.mark_bitmap(start, bitmap)
        else:
            dirty.mark(start, end - start)
