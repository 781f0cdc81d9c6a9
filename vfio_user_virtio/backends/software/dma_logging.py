"""Dirty tracking of a member: which guest memory it has written since its client last asked.

Rule: nothing of what the member writes may be missing when a report comes after it, and a report
clears.  So a mark counts only if it is made after the last report that came before the write.  How
each kind of write keeps to that:

- A buffer is marked when its chain is taken and its views are made (`Queues.log_writes`); which of
  its bytes are filled later is not looked at.  Control commands are taken, answered and returned in
  one go, and no report comes between.  Receive buffers are kept for frames to come, and an uplink
  may read into them what is then filtered or goes elsewhere.  So each report makes the receivers
  give back what they keep: what they take again is marked again, and a device to which nothing
  happens takes nothing.  All of it happens between two frames, since reports are answered on the
  thread that moves frames, and no uplink waits between `reserve` and `commit`.
- A used ring remembers that it was written (`SplitQueue.used_written`), by whatever: an entry, the
  index, the flags, the event index.  A report asks each ring, and so does whatever closes one.
  Comparing positions instead would miss 65,536 entries, or flags that were set and cleared while
  the client copied the page.
- The slow path (`GuestAccess`, also by messages) marks after the write, be it done or failed half
  way.  Marked before, it could be reported before it has happened.  A message that is under way
  when a report comes is in the next one.

A member that is stopped has closed its queues and waited for its messages, so the report after that
is complete.  Marks are IOVAs, and stay when the memory there is unmapped.

Logging outlasts resets, as in Linux's drivers: a guest that reboots while it is migrated is still
copied, and what the device wrote before is still to be told.  It ends with the session.

The page size that a client names when it starts is a hint; pages of `limits.PAGE_SIZE` are logged,
the finest that anybody copies, and reports are in any size.

While nothing is logged, nothing of this is on the path of a frame but the note in the ring.

Rejected: marking what was filled instead of what was taken.  The path of each frame would carry
addresses beside views; what is saved is at most a frame's worth of buffers per queue and report.

Source: vfio-user, VFIO_USER_DEVICE_FEATURE, DMA logging; errors as Linux's mlx5-vfio-pci has them.
"""

from __future__ import annotations

import errno
import logging
from typing import TYPE_CHECKING, Final

from vfio_user_virtio import limits
from vfio_user_virtio.errors import ClientError
from vfio_user_virtio.memory.dirty_log import DirtyLog

if TYPE_CHECKING:
    from vfio_user_virtio.backends.software.queues import Queues
    from vfio_user_virtio.device import LoggingReport, LoggingStart

_log: Final = logging.getLogger(__name__)


class MemberLogging:
    """What the member `name`, whose queues are `queues`, has written."""

    exact: Final = True

    def __init__(self, name: str, queues: Queues) -> None:
        self._name = name
        self._queues = queues
        self._dirty: DirtyLog | None = None
        self._told = False

    @property
    def active(self) -> bool:
        """Whether writes are logged."""
        return self._dirty is not None

    def start_logging(self, start: LoggingStart) -> None:
        """Log writes from now on.  Raises ClientError EINVAL if that is being done."""
        if self._dirty is not None:
            raise ClientError(
                errno.EINVAL, f"{self._name}: DMA logging is on; stop it before it is started again"
            )
        self._dirty = DirtyLog(limits.PAGE_SIZE, start.ranges)
        self._told = False
        self._queues.log_writes(self._dirty.mark)

    def stop_logging(self) -> None:
        """Log no more, and forget what was logged; nothing if that has been done."""
        if self._dirty is not None:
            self._dirty = None
            self._queues.log_writes(None)

    def report_logging(self, report: LoggingReport) -> bytes:
        """The bitmap of what was written since the last report of it; see `DirtyLog`.

        Its size is the caller's to bound.  Raises ClientError EINVAL if nothing is logged.
        """
        dirty = self._dirty
        if dirty is None:
            raise ClientError(
                errno.EINVAL, f"{self._name}: DMA logging is off; start it, then ask for reports"
            )
        self._queues.settle_writes()
        bitmap = dirty.report_and_clear(report.iova, report.length, report.page_size)
        if dirty.overflowed and not self._told:
            self._told = True
            _log.warning(
                "%s: the guest's addresses are too scattered to log (more than %d chunks of 32 MiB "
                "are written); all of its memory counts as written until logging stops",
                self._name,
                limits.MAX_DIRTY_CHUNKS,
            )
        return bitmap

    def wrote(self, iova: int, size: int) -> None:
        """`size` ≥ 1 bytes at `iova` have been written, other than through views of a queue."""
        if self._dirty is not None:
            self._dirty.mark(iova, size)
