"""A physical function as an operator sees it: what is counted, and its client's memory.

To serve packets this process need not see guest memory, and does not.  Who moves a guest needs the
pages that the device wrote; so where there is a control interface, each file is mapped here as
well, once and whole, which costs address space and nothing else until a page is asked for.  A file
that is not sealed against shrinking is not mapped, as it could end this process; then the device
works, and its pages cannot be had.

The network is told of the device by whoever is its hardware, so `announce` is not offered.
"""

from __future__ import annotations

import contextlib
import logging
import os
from typing import TYPE_CHECKING, Final

import attrs

from vfio_user_virtio.device import U64_END
from vfio_user_virtio.errors import ClientError
from vfio_user_virtio.memory.access import GuestAccess
from vfio_user_virtio.memory.guest_memory import GuestMemory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from vfio_user_virtio.backends.vfio.dma import ClientMemory
    from vfio_user_virtio.device import DmaMapping, RemoteMemory

_log: Final = logging.getLogger(__name__)


class VfOperator:
    """The function `name`, whose client's `memory` is mapped here too if `sees_memory`.

    `replay`: kick each queue and send each interrupt; the guest must not be setting the device up
    meanwhile; raises ClientError.
    """

    def __init__(
        self,
        name: str,
        memory: ClientMemory,
        replay: Callable[[], None],
        *,
        sees_memory: bool,
    ) -> None:
        self.offers: Final = frozenset({"replay", "memory"} if sees_memory else {"replay"})
        self.replay: Final = replay
        self.guest_access: GuestAccess | None = None
        self._name = name
        self._memory = memory
        self._pages = GuestMemory() if sees_memory else None
        self._told = False

    def counters(self) -> dict[str, dict[str, int]]:
        """By group."""
        counts = {"mappings": len(self._memory), "pinned_bytes": self._memory.pinned_bytes}
        return {"memory": counts}

    def announce(self) -> None:
        """Not offered."""

    # --- the life of a session -----------------------------------------------------------------

    def session_begins(self, remote: RemoteMemory) -> None:
        if self._pages is not None:
            self.guest_access = GuestAccess(self._pages, remote)

    def session_ends(self) -> None:
        self.guest_access = None
        self.unmapped(0, U64_END)

    @contextlib.contextmanager
    def mapping(self, wanted: DmaMapping) -> Iterator[None]:
        """What is mapped for the device inside is mapped here too, if that goes well."""
        if self._pages is None:
            yield
            return
        copy = None
        if wanted.fd is not None:
            with contextlib.suppress(OSError):  # too many open: the device comes first
                copy = os.dup(wanted.fd)
        try:
            yield
        except BaseException:
            if copy is not None:
                os.close(copy)
            raise
        self._map(self._pages, attrs.evolve(wanted, fd=copy))

    def unmapped(self, iova: int, size: int) -> None:
        """The device no longer reaches what was mapped in the range."""
        if self._pages is not None:
            self._pages.unmap(iova, size)

    def _map(self, pages: GuestMemory, mapping: DmaMapping) -> None:
        try:
            pages.map(mapping)
        except ClientError as error:
            if not self._told:
                self._told = True
                _log.warning(
                    "%s: pages that the device writes cannot be had for moving its guest: %s",
                    self._name,
                    error.args[0],
                )
            pages.map(attrs.evolve(mapping, fd=None))
