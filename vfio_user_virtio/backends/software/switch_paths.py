"""What about a switch's paths does not depend on the frame: worked out when a port changes.

`SwitchPort` holds the results: whether a port is up, what it lacks, and, where there are but two
ports that do nothing special, the fast way from one to the other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vfio_user_virtio.backends.software.ports import DirectPort, Offload
from vfio_user_virtio.virtio.offload import CSUM, EVERYTHING, INVALID, STRAY_FLAGS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vfio_user_virtio.backends.software.switch_port import SwitchPort


def work_out_paths(ports: Sequence[SwitchPort]) -> list[SwitchPort]:
    """Set the paths of all ports anew, and tell the uplinks; returns those that have gone down."""
    gone_down = []
    for at in ports:
        at.fold_fast_counters()
    for at in ports:
        was_up, at.up = at.up, at.port.up
        at.lacks = (EVERYTHING & ~int(at.port.offloads)) | INVALID
        if at.lacks & CSUM:
            at.lacks |= STRAY_FLAGS  # DATA_VALID is for those with GUEST_CSUM
        if was_up and not at.up:
            gone_down.append(at)
            at.backlog.clear()
        at.fast_peer = at.fast_deliver = at.direct = None
    if len(ports) == 2 and all(
        at.vlans.is_plain and at.capture is None and not at.backlog for at in ports
    ):
        _connect(ports[0], ports[1])
        _connect(ports[1], ports[0])
    for at in ports:
        if at.uplink is not None:
            _tell_uplink(at, [other for other in ports if other is not at and other.up])
    return gone_down


def _connect(at: SwitchPort, peer: SwitchPort) -> None:
    """Set the fast path from `at` to `peer`, the only other port."""
    at.fast_peer = peer  # also where `Switch.received_directly` is counted
    if not peer.up or at.limiter is not None:
        return
    at.fast_deliver = peer.port.deliver
    at.fast_lacks = peer.lacks
    if peer.uplink is not None:
        at.fast_lacks &= ~STRAY_FLAGS
    elif at.uplink is None:
        at.fast_lacks |= STRAY_FLAGS
    elif isinstance(peer.port, DirectPort):
        at.direct = peer.port


def _tell_uplink(at: SwitchPort, receivers: Sequence[SwitchPort]) -> None:
    """Tell an uplink what all its receivers take unfinished, if that has changed."""
    common = EVERYTHING if receivers else 0
    for other in receivers:
        common &= ~other.lacks
    if common != at.told and at.uplink is not None:
        at.told = common
        at.uplink.receivers_take(Offload(common))
