"""STOPPED mode of a member, and the state that is put into it meanwhile (virtio 1.4, Device parts,
DEV_MODE_SET).

A member that is stopped touches no guest memory and sends no interrupt.  It goes on answering its
registers, notes kicks, and takes parts, which wait here (`staged`) until it is let run.  `stop`
first finishes what was taken from the rings, or puts it back, so that each queue stands where its
used index in guest memory says: no part carries a position, and `resume` reads them from there.

`resume` cannot know which interrupts the driver has missed, here or where the state came from, so
it sends one for each queue and one for the configuration.  A member that goes on with the state of
another place is announced: by its driver if that can (GUEST_ANNOUNCE), and by a frame of ours.

Frames for a member that is stopped wait, as they do for one whose receive ring is empty, and like
those not for long (`limits.MAX_BLOCKED_SECONDS`): most stops are a few milliseconds of a migration,
and so the network may be told of the new place before the device runs there.

Where the standard is silent: a reset of the function (FLR, power state, the client's) leaves
STOPPED mode, as Linux's driver assumes, and a reset of the virtio device does not.  Either drops
what was staged, since a reset puts every part to its default.

What parts lack of a virtio-net device is `private_state`.  What is in neither: automatic receive
steering, which learns anew from what the driver sends, and interrupts that are pending.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

from vfio_user_virtio import limits
from vfio_user_virtio.backends.software.member_parts import (
    DeviceState,
    largest_image_size,
    parts_of,
    with_parts_untrusted,
)
from vfio_user_virtio.migration.private_record import PrivateState
from vfio_user_virtio.virtio.net_config import NetStatus
from vfio_user_virtio.virtio.net_control import GUEST_OFFLOADS
from vfio_user_virtio.virtio.parts import PartsError, image_size

if TYPE_CHECKING:
    from collections.abc import Iterable

    from vfio_user_virtio.backends.software.member import Member
    from vfio_user_virtio.backends.software.queues import Queues
    from vfio_user_virtio.virtio.parts import Part

_log: Final = logging.getLogger(__name__)

_ISR_BITS: Final = 3


class StoppedMode:
    """Whether `member` is stopped, and what waits for it to go on."""

    def __init__(self, member: Member, queues: Queues) -> None:
        self._member = member
        self._queues = queues
        self.stopped = False
        self.stopping = False
        """Nothing more is taken or delivered; what was taken is being finished."""
        self._staged: DeviceState | None = None
        self._private: PrivateState | None = None
        self._interrupts_owed = False
        self._arrived = False
        """What runs next came from elsewhere, and the network has to be told."""

    async def stop(self) -> bool:
        """Enter STOPPED mode; True at once if that has been done.

        It takes `limits.STOP_SECONDS` if accesses to guest memory are under way that the client
        does not answer.  False: another `stop` is under way.
        """
        if self.stopped or self.stopping:
            return self.stopped
        if not self._queues.settle():
            await self._quiesce()
        self.stopped = True
        self._member.flush()
        self._member.update_running()
        self._member.paused()
        _log.info("%s: stopped", self._member.name)
        return True

    async def _quiesce(self) -> None:
        member = self._member
        quiet = False
        self.stopping = True
        member.paused()
        try:
            await self._queues.slow.quiesce(limits.STOP_SECONDS)
            quiet = True
        finally:
            self.stopping = False
            if not quiet:
                member.paused()
                member.resume()

    def resume(self) -> None:
        """Leave STOPPED mode: what was staged takes effect.  Nothing if it is running."""
        if not self.stopped:
            return
        member = self._member
        self.stopped = False
        if self._staged is not None:
            member.restore(self._staged)
            self._arrived = True
        if self._private is not None:
            self._restore_private(self._private)
        self._staged = self._private = None
        self._queues.start_from_memory()
        self._interrupts_owed = member.function.common.live
        _log.info("%s: let run again", member.name)
        member.update_running()
        member.paused()

    def started(self) -> None:
        """The member has begun to run: send what interrupts its driver may have missed."""
        if self._arrived:
            self._arrived = False
            self._member.announce()
            self._member.announce_to_network()
        if not self._interrupts_owed:
            return
        self._interrupts_owed = False
        self._member.function.interrupt_all()

    def device_reset(self) -> None:
        """The virtio device has been reset."""
        self._staged = self._private = None
        self._interrupts_owed = self._arrived = False

    def function_reset(self) -> None:
        """The whole function has been reset."""
        was_stopped, self.stopped = self.stopped, False
        self.device_reset()
        if was_stopped:
            self._member.paused()

    # --- parts ---------------------------------------------------------------------------------

    def parts(self) -> list[Part]:
        """Every part, in the canonical order; of what is staged, if anything is."""
        return parts_of(self._member.config, self._state())

    def size(self) -> int:
        """Bytes of an image: as they are if the member is stopped, else the most they can become
        before it is asked for."""
        if self.stopped:
            return image_size(self.parts())
        return largest_image_size(self._member.config)

    def set_parts_untrusted(self, parts: Iterable[Part]) -> None:
        """Stage `parts`; they take effect at `resume`.

        Raises PartsError, having changed nothing, if one does not fit or the member is running.
        """
        try:
            self._require_stopped()
            self._staged = with_parts_untrusted(self._member.config, self._state(), parts)
        except PartsError as error:
            _log.warning("%s: refused an image: %s", self._member.name, error)
            raise

    def private_state(self) -> PrivateState:
        """What parts lack: as it is, or as it is staged."""
        if self._private is not None:
            return self._private
        member = self._member
        state = self._state()
        status = NetStatus.LINK_UP if member.link_up else NetStatus(0)
        if state.net.announce:
            status |= NetStatus.ANNOUNCE
        return PrivateState(
            guest_offloads=state.net.guest_offloads,
            mac=state.net.filter.mac,
            status=status,
            config_generation=state.common.config_generation,
            isr=member.function.isr,
        )

    def set_private_state_untrusted(self, private: PrivateState) -> None:
        """Stage what parts lack.  The link is not the driver's and stays as it is here.

        Raises PartsError, having changed nothing, if it does not fit or the member is running.
        """
        self._require_stopped()
        if surplus := (private.guest_offloads or 0) & ~(self._offered & GUEST_OFFLOADS):
            raise PartsError("guest_offloads", None, f"{surplus:#x} is not offered here")
        if private.mac is not None and len(private.mac) != 6:
            raise PartsError("mac", None, f"it has {len(private.mac)} bytes, not 6")
        for name, value, largest in (
            ("config_generation", private.config_generation, 0xFF),
            ("isr", private.isr, _ISR_BITS),
        ):
            if value is not None and not 0 <= value <= largest:
                raise PartsError(name, None, f"it is {value}; it can be 0 to {largest}")
        self._private = private

    @property
    def _offered(self) -> int:
        return self._member.config.offered

    def _state(self) -> DeviceState:
        if self._staged is not None:
            return self._staged
        return DeviceState(self._member.function.common.state, self._member.state)

    def _require_stopped(self) -> None:
        if not self.stopped:
            raise PartsError("the image", None, "the member is running; stop it first")

    def _restore_private(self, private: PrivateState) -> None:
        member = self._member
        net, common = member.state, member.function.common.state
        if private.guest_offloads is not None:
            net.guest_offloads = private.guest_offloads & net.features & GUEST_OFFLOADS
        if private.mac is not None:
            net.filter.mac = private.mac
        if private.status is not None:
            net.announce = private.announce_pending
        if private.config_generation is not None:
            common.config_generation = private.config_generation
        if private.isr is not None:
            member.function.isr |= private.isr
