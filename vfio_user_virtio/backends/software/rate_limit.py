"""A token bucket: how fast a member may send.

Plain data and arithmetic, with the time as an argument.  A frame may go as soon as the bucket is
not in debt, and is then paid for in full, so that one of 64 KiB passes a bucket of any size and the
long-run rate holds all the same.  What may pass in any t seconds is at most
burst + rate · t + one frame.  Modelled on the kernel's tc-tbf, which wants a burst of at least
one packet instead.
"""

from __future__ import annotations

import math

import attrs

from vfio_user_virtio import limits


@attrs.define
class TokenBucket:
    """`rate`: bits per second.  `burst`: bytes that may pass at once after a pause.

    `tokens` (bytes) and `filled_at` (seconds) are the state; a bucket starts full.
    """

    rate: float = attrs.field(validator=attrs.validators.gt(0))
    burst: float = attrs.field(validator=attrs.validators.gt(0))
    tokens: float = attrs.field(
        default=attrs.Factory(lambda self: self.burst, takes_self=True), kw_only=True
    )
    filled_at: float = attrs.field(default=-math.inf, kw_only=True)

    @classmethod
    def of(cls, rate: float, burst: float | None = None) -> TokenBucket:
        """A bucket of `rate` bits per second; its burst, unless given, is a moment's worth."""
        if burst is None:
            burst = max(rate / 8 * limits.MAX_BURST_SECONDS, 1_500.0)
        return cls(rate, burst)

    def take(self, size: int, now: float) -> float:
        """Take `size` bytes at `now`: 0; or take none and return the seconds to wait for them."""
        bytes_per_second = self.rate / 8
        if now > self.filled_at:
            gained = (now - self.filled_at) * bytes_per_second
            self.tokens = min(self.burst, self.tokens + gained)
            self.filled_at = now
        if self.tokens < 0:
            return -self.tokens / bytes_per_second
        self.tokens -= size
        return 0.0

    def give_back(self, size: int) -> None:
        """What was taken was not sent after all."""
        self.tokens = min(self.burst, self.tokens + size)
