"""An uplink to the host's network through a TAP device, without a copy where that is safe.

Frames go between guest memory and the kernel by one readv or writev each, with the virtio_net_hdr
in front (IFF_VNET_HDR), so that segmentation and checksums are left to whoever does them best: the
kernel is told (TUNSETOFFLOAD) to finish whatever not every receiver takes.

Reading straight into guest memory is for the one member that is alone on the switch
(`Switch.direct_receiver`).  The kernel may still have frames queued that are less finished than a
receiver that has just changed its mind takes; those make the detour through the switch.
"""

from __future__ import annotations

import errno
import logging
import os
from typing import TYPE_CHECKING, Final

from vfio_user_virtio import limits
from vfio_user_virtio.backends.software.ports import (
    HEAD_SIZE,
    NET_HEADER_SIZE,
    Offload,
    first_bytes,
)
from vfio_user_virtio.backends.software.uplinks.base import (
    MAX_PARTS,
    PacketUplink,
    in_one_piece,
)
from vfio_user_virtio.backends.software.uplinks.tun_device import ALL_OFFLOADS

if TYPE_CHECKING:
    from vfio_user_virtio.backends.software.ports import DirectPort, Frame
    from vfio_user_virtio.backends.software.switch import Switch
    from vfio_user_virtio.backends.software.uplinks.tun_device import TapDevice

_log = logging.getLogger(__name__)

_DEVICE_GONE: Final = frozenset((errno.EBADFD, errno.EBADF, errno.ENODEV))


class TapUplink(PacketUplink):
    """An uplink on a TAP device, whose descriptor it owns: `close` when `run` has ended."""

    def __init__(self, switch: Switch, device: TapDevice) -> None:
        super().__init__(switch, f"tap {device.name}", with_header=device.vnet_hdr)
        self._device = device
        self._all_take_everything = False
        self._closed = False

    @property
    def offloads(self) -> Offload:
        return self._device.offloads

    def receivers_take(self, offloads: Offload) -> None:
        self._all_take_everything = offloads == ALL_OFFLOADS
        if not self._closed:
            try:
                self._device.set_offloads(offloads)
            except OSError as error:
                self._fail(f"TUNSETOFFLOAD failed: {error.strerror}")

    async def run(self) -> None:
        """Move frames until cancelled; or log why that is no longer possible, and return."""
        reason = await self.serve(self._device.fd)
        _log.error("uplink %s is down: %s; members go on without it", self.name, reason)

    def close(self) -> None:
        """Close the device.  Not while `run` runs."""
        self._closed = True
        os.close(self._device.fd)

    # --- to the host --------------------------------------------------------------------------

    def deliver(self, frame: Frame, size: int) -> bool:
        try:
            if self._read_at:
                os.writev(self._fd, in_one_piece(frame))
            else:
                os.writev(self._fd, frame)
        except BlockingIOError:
            return self._choke()
        except OSError as error:
            return self._not_delivered(frame, error)
        return True

    def _not_delivered(self, frame: Frame, error: OSError) -> bool:
        """The kernel refuses the frame: True, it is dealt with."""
        if error.errno in _DEVICE_GONE:
            self._fail(f"writing failed: {error.strerror}")
        elif error.errno == errno.EINVAL and len(frame) > MAX_PARTS:
            return self.deliver((b"".join(frame),), 0)
        self.discarded += 1  # EINVAL: its header is wrong; EIO: the device is not up; no memory …
        return True

    # --- from the host ------------------------------------------------------------------------

    def _drain(self) -> None:
        direct = None if self._read_at else self._switch.direct_receiver(self)
        if direct is None:
            self._drain_by_copy()
        elif self._send_kept():
            self._drain_directly(direct)

    def _drain_directly(self, port: DirectPort) -> None:
        """Read frames straight into the memory of `port`.  Raises OSError if reading fails."""
        fd, readv, reserve, commit = self._fd, os.readv, port.reserve, port.commit
        any_frame_will_do = self._all_take_everything
        frames = total = 0
        try:
            for _ in range(limits.WORK_BUDGET):
                room = reserve()
                if room is None:
                    self._starved = True
                    self._switch.wait_for_room(self, port)
                    return
                size = readv(fd, room)
                if any_frame_will_do or self._is_finished(room[0]):
                    commit(size)
                    frames += 1
                    total += size
                    if frames == 1:
                        port.flush()  # who waits for one frame hears of it before we look for more
                else:
                    self._forward_copy(first_bytes(room, size))
                    return  # the path may no longer be direct
        except BlockingIOError:
            return
        finally:
            if frames:
                self._switch.received_directly(self, frames, total)

    @staticmethod
    def _is_finished(first: memoryview) -> bool:
        """Whether the frame that begins with `first` asks for nothing."""
        return len(first) >= NET_HEADER_SIZE and not first[0] | first[1]

    def _forward_copy(self, data: bytes) -> None:
        """Send a frame through the switch, which finishes it if need be."""
        frame: Frame = (data[:HEAD_SIZE], memoryview(data)[HEAD_SIZE:])
        if not self._switch.forward(self, frame, len(data)):
            self._keep(frame, len(data))

    def _read_failed(self, error: OSError) -> None:
        if error.errno == errno.EFAULT and self._guest_memory_is_at_fault():
            self.discarded += 1
            return
        super()._read_failed(error)

    def _guest_memory_is_at_fault(self) -> bool:
        """Whether the device itself can be read: the client has taken away what it had mapped."""
        try:
            os.readv(self._fd, self._read_into)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return True
