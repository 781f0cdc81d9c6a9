"""Guest memory that is watched: what the device wrote, as the guest's pages tell it themselves.

No page of it belongs to two buffers, and it knows from the driver which pages the device may write.
Whatever differs there from one look to the next was written by the device, since the driver's own
writes to such pages (a buffer is zeroed when it is allocated) are allowed for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.backends import member_rig
from vfio_user_virtio.device import LoggingReport, LoggingStart
from vfio_user_virtio.testing.driver_queue import DriverQueue
from vfio_user_virtio.testing.guest_ram import GuestBuffer, GuestRam
from vfio_user_virtio.virtio.split_queue import ring_layout

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import pytest

    from tests.backends.member_rig import Guest
    from vfio_user_virtio.testing.driver_queue import Segment

PAGE = 4096
_CHUNK = 64 * PAGE


def pages_of(iova: int, size: int) -> range:
    return range(iova // PAGE, (iova + size - 1) // PAGE + 1)


def bits(bitmap: bytes) -> set[int]:
    """The numbers of the bits that are set."""
    number = int.from_bytes(bitmap, "little")
    return {bit for bit in range(number.bit_length()) if number >> bit & 1}


class WatchedRam(GuestRam):
    """See the module head."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.of_device: set[int] = set()
        """Pages that the device may write."""
        self.were_of_device: set[int] = set()
        """Pages that were freed, and that it may have written before."""
        self.seen = bytearray(size)

    def allocate(self, size: int, *, align: int = 64) -> GuestBuffer:
        buffer = super().allocate(size, align=max(align, PAGE))
        pages = self.of_device.intersection(pages_of(buffer.iova, size))
        self.of_device -= pages
        self.were_of_device |= pages
        start = buffer.iova - self.iova
        self.seen[start : start + size] = bytes(size)
        return buffer

    def give(self, segments: Iterable[Segment]) -> None:
        """The device may write there."""
        for iova, size in segments:
            self.of_device.update(pages_of(iova, size))

    def changed(self) -> set[int]:
        """Pages that the device has written since the last call."""
        now = bytes(self.view(self.iova, self.size))
        found = set()
        for chunk in range(0, self.size, _CHUNK):
            if now[chunk : chunk + _CHUNK] != self.seen[chunk : chunk + _CHUNK]:
                for start in range(chunk, chunk + _CHUNK, PAGE):
                    if now[start : start + PAGE] != self.seen[start : start + PAGE]:
                        found.add((self.iova + start) // PAGE)
        self.seen[:] = now
        return found & self.of_device


def watch_guests(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guests of `member_rig` have watched memory from now on."""
    add = DriverQueue.add

    def watched(
        queue: DriverQueue[object],
        token: object,
        readable: Sequence[Segment] = (),
        writable: Sequence[Segment] = (),
    ) -> int:
        if isinstance(queue._ram, WatchedRam):
            queue._ram.give(writable)
        return add(queue, token, readable, writable)

    monkeypatch.setattr(DriverQueue, "add", watched)
    monkeypatch.setattr(member_rig, "GuestRam", WatchedRam)


class Watch:
    """The dirty log of a guest's member, and what it should say."""

    def __init__(self, guest: Guest, *ranges: Segment) -> None:
        assert isinstance(guest.ram, WatchedRam)
        self.ram = guest.ram
        self._member = guest.member
        self.owed: set[int] = set()
        """Pages that were written and not reported since."""
        self.look()
        self.owed.clear()
        self._member.logging.start_logging(LoggingStart(PAGE, ranges))

    def look(self) -> set[int]:
        """Pages that were written since the last look."""
        for queue in self._member.function.common.state.queues:
            if queue.enabled:
                self.ram.give([(queue.device, ring_layout(queue.size).used)])
        changed = self.ram.changed()
        self.owed |= changed
        return changed

    def report(self, *, in_flight: bool = False) -> set[int]:
        """The pages of a report of all memory, which must hold all that are owed.

        But for messages whose replies are on their way, if some may be `in_flight`: what they have
        written is owed until it is reported.
        """
        self.look()
        ram = self.ram
        bitmap = self._member.logging.report_logging(LoggingReport(ram.iova, ram.size, PAGE))
        reported = {ram.iova // PAGE + bit for bit in bits(bitmap)}
        assert in_flight or self.owed <= reported, "written, and not in the report"
        may_be = ram.of_device | ram.were_of_device
        assert reported <= may_be, "reported, and not the device's to write"
        ram.were_of_device.clear()
        self.owed -= reported
        return reported
