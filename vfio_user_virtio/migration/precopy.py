"""What a device that is being saved has to say, and to give, while it still runs: plain arithmetic.

While in PRE_COPY a client asks how much there is (precopy info) and reads.  The device has no way
to tell what changed, so a refresh is a whole new image, and asking must not cost one each time.
Hence Linux's rules, which are kept to the letter, quirks and all, because clients' estimates of
convergence and downtime are tuned to them:

- a refresh needs a token; the first is there at once, and each takes more than `REFRESH_SECONDS`
  since the one before (the kernel's ratelimit of 1 s, burst 1);
- a token is spent by asking the device how large an image would be (`fresh`), even if the answer is
  not used;
- until the first record has been read, the rest of it is `initial_bytes`, and nothing is dirty;
- after that everything unread is `dirty_bytes`, and `fresh` is added to it (so what is reported is
  16 bytes short of what the refresh makes readable, and too much where there is a backlog);
- only with nothing unread is a new image queued.

Nothing unread is lost on the way to STOP_COPY: leftovers are read before the final record.  Reading
with nothing queued gives nothing: where the kernel has ENOMSG in PRE_COPY and the end of the file
in STOP_COPY, vfio-user has a reply with fewer bytes.

The order of one precopy info, with the device's two commands between the steps:

1. ``fresh = size of the metadata if session.limiter.allow(now) else 0``
2. ``info = session.info(fresh)``
3. ``if session.needs_refresh(fresh)``: get an image, ``session.queue(header, image)``

A refreshed image is queued with nothing unread, so at most one and the final one are held.

Source: Linux, drivers/vfio/pci/virtio/migrate.c, lib/ratelimit.c; linux/vfio.h,
VFIO_MIG_GET_PRECOPY_INFO.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Final

import attrs

if TYPE_CHECKING:
    from vfio_user_virtio.protocol.header import Buffer

REFRESH_SECONDS: Final = 1.0
"""A refresh comes strictly later than this after the one before it."""


@attrs.frozen
class PrecopyInfo:
    """Bytes that are there to be read: of the first record, and beside it.  Estimates."""

    initial_bytes: int
    dirty_bytes: int


@attrs.define
class RateLimiter:
    """One token, there at first, and again more than `REFRESH_SECONDS` after it was last taken.

    `taken_at`: when that was, in the seconds of the caller's clock.
    """

    taken_at: float | None = None

    def allow(self, now: float) -> bool:
        """Take the token if it is there."""
        if self.taken_at is not None and now <= self.taken_at + REFRESH_SECONDS:
            return False
        self.taken_at = now
        return True


@attrs.define
class SavingSession:
    """What one saving session has queued, and how far it was read; positions are in bytes.

    `initial_end`: where the first record ends.  `queued_end`: where the last one does.
    """

    limiter: RateLimiter = attrs.field(factory=RateLimiter)
    position: int = 0
    initial_end: int = 0
    queued_end: int = 0
    _pieces: deque[memoryview] = attrs.field(factory=deque, repr=False)

    @property
    def backlog(self) -> int:
        """Bytes that are queued and unread."""
        return self.queued_end - self.position

    def queue(self, *pieces: Buffer) -> None:
        """Add a record, its header and its payload; they must not change any more.

        The first record that is queued is the initial one.
        """
        views = [memoryview(piece) for piece in pieces if piece]
        if not self.queued_end:
            self.initial_end = sum(map(len, views))
        self._pieces += views
        self.queued_end += sum(map(len, views))

    def read(self, count: int) -> bytes | memoryview:
        """The next `count` bytes, across records; fewer, or none, if there are no more now."""
        taken: list[memoryview] = []
        left = count
        while left and self._pieces:
            piece = self._pieces.popleft()
            if len(piece) > left:
                self._pieces.appendleft(piece[left:])
                piece = piece[:left]
            taken.append(piece)
            left -= len(piece)
        self.position += count - left
        return taken[0] if len(taken) == 1 else b"".join(taken)

    def info(self, fresh: int) -> PrecopyInfo:
        """What precopy info answers; `fresh` is the size of a new image, 0 if it was not asked."""
        if self.position < self.initial_end:
            return PrecopyInfo(self.initial_end - self.position, 0)
        return PrecopyInfo(0, self.backlog + fresh)

    def needs_refresh(self, fresh: int) -> bool:
        """Whether a new image is to be queued after that answer."""
        return bool(fresh) and not self.backlog
