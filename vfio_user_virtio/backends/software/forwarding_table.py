"""Which port an address was last seen behind: the switch's filtering database.

Modelled on the FDB of the Linux bridge and IEEE 802.1Q (independent VLAN learning), with two
bounds, since guests choose the addresses: one for the table and one for each port.  Beyond either
nothing is learnt, and frames to such an address are flooded.  There is no timer: an entry that is
too old is as good as none when it is looked at, and the old ones are swept out when room is needed,
at most once per second.
"""

from __future__ import annotations

from typing import Final, Generic, TypeVar

from vfio_user_virtio import limits

Place = TypeVar("Place")

_SWEEP_SECONDS: Final = 1.0


class _Entry(Generic[Place]):
    __slots__ = ("place", "seen")

    def __init__(self, place: Place, seen: float) -> None:
        self.place = place
        self.seen = seen


class ForwardingTable(Generic[Place]):
    """(VLAN, address) → place.  Times are in seconds of one clock that never goes back."""

    def __init__(
        self,
        *,
        age: float = limits.FDB_AGE_SECONDS,
        max_entries: int = limits.MAX_FDB_ENTRIES,
        max_per_place: int = limits.MAX_FDB_ENTRIES_PER_PORT,
    ) -> None:
        self._age = age
        self._max_entries = max_entries
        self._max_per_place = max_per_place
        self._entries: dict[tuple[int, bytes], _Entry[Place]] = {}
        self._counts: dict[Place, int] = {}
        self._next_sweep = 0.0

    def __len__(self) -> int:
        return len(self._entries)

    def learn(self, vlan: int, address: bytes, place: Place, now: float) -> None:
        """`address`, which is not a group address, was seen behind `place`."""
        key = (vlan, address)
        entry = self._entries.get(key)
        if entry is not None and entry.place is place:
            entry.seen = now
            return
        if entry is not None:
            self._forget(key, entry)  # wherever it is, it is not there any more
        if self._has_room(place, now):
            self._entries[key] = _Entry(place, now)
            self._counts[place] = self._counts.get(place, 0) + 1

    def look_up(self, vlan: int, address: bytes, now: float) -> Place | None:
        """Where `address` is, or None if nobody knows."""
        entry = self._entries.get((vlan, address))
        if entry is None or now - entry.seen > self._age:
            return None
        return entry.place

    def forget(self, place: Place) -> None:
        """Forget all that was learnt of `place`."""
        if self._counts.pop(place, 0):
            self._entries = {
                key: entry for key, entry in self._entries.items() if entry.place is not place
            }

    def clear(self) -> None:
        self._entries.clear()
        self._counts.clear()

    def _has_room(self, place: Place, now: float) -> bool:
        if self._fits(place):
            return True
        if now < self._next_sweep:
            return False
        self._sweep(now)
        return self._fits(place)

    def _fits(self, place: Place) -> bool:
        return (
            len(self._entries) < self._max_entries
            and self._counts.get(place, 0) < self._max_per_place
        )

    def _sweep(self, now: float) -> None:
        for key, entry in list(self._entries.items()):
            if now - entry.seen > self._age:
                self._forget(key, entry)
        self._next_sweep = now + _SWEEP_SECONDS

    def _forget(self, key: tuple[int, bytes], entry: _Entry[Place]) -> None:
        del self._entries[key]
        self._counts[entry.place] -= 1
