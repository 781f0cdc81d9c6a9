"""Commands on the control virtqueue of virtio-net (virtio 1.4, Network Device, Control Virtqueue).

A command is class u8, command u8 and data, all read by the device; the answer is one byte.  What a
command does to the device's state is a row of `_COMMANDS`: the feature that must have been
negotiated and the function that applies it.  A command that is unknown, not negotiated, of the
wrong length or out of range answers ERR and changes nothing.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Final

import attrs

from vfio_user_virtio.virtio.features import Feature, mask_of
from vfio_user_virtio.virtio.rx_filter import MAX_VLAN, FilterState

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

OK: Final = b"\x00"
ERR: Final = b"\x01"

GUEST_OFFLOADS: Final = mask_of(
    (
        Feature.GUEST_CSUM,
        Feature.GUEST_TSO4,
        Feature.GUEST_TSO6,
        Feature.GUEST_ECN,
        Feature.GUEST_USO4,
        Feature.GUEST_USO6,
    )
)
"""What GUEST_OFFLOADS_SET may contain; its bits are the feature bits."""


class ControlClass(enum.IntEnum):
    """Class of a control command."""

    RX = 0
    MAC = 1
    VLAN = 2
    ANNOUNCE = 3
    MQ = 4
    GUEST_OFFLOADS = 5


class Change(enum.Flag):
    """What the device has to do after a command."""

    NOTHING = 0
    MAC = enum.auto()
    QUEUE_PAIRS = enum.auto()
    OFFLOADS = enum.auto()
    ANNOUNCED = enum.auto()


@attrs.define
class NetState:
    """What the driver of a virtio-net device has set, as plain data.

    `queue_pairs` is how many pairs are in use; `guest_offloads` is a word of GUEST_… feature bits;
    `announce` says that the driver has been asked to announce itself and has not acknowledged.
    """

    filter: FilterState
    features: int = 0
    max_queue_pairs: int = 1
    queue_pairs: int = 1
    guest_offloads: int = 0
    announce: bool = False


class _Refused(Exception):
    """The command answers ERR."""


def execute_untrusted(state: NetState, command: bytes) -> tuple[bytes, Change]:
    """Apply one command of the guest to `state`: the answer, and what follows from it."""
    if len(command) < 2:
        return ERR, Change.NOTHING
    entry = _COMMANDS.get((command[0], command[1]))
    if entry is None or not state.features >> entry[0] & 1:
        return ERR, Change.NOTHING
    try:
        return OK, entry[1](state, command[2:])
    except _Refused:
        return ERR, Change.NOTHING


def _number(data: bytes, size: int) -> int:
    """The little-endian number in the first `size` bytes; more is a newer driver's business."""
    if len(data) < size:
        raise _Refused
    return int.from_bytes(data[:size], "little")


def _switch(name: str) -> Callable[[NetState, bytes], Change]:
    def apply(state: NetState, data: bytes) -> Change:
        value = _number(data, 1)
        if value > 1:
            raise _Refused
        setattr(state.filter, name, bool(value))
        return Change.NOTHING

    return apply


def _mac_table(data: bytes, offset: int) -> tuple[list[bytes], int]:
    entries = _number(data[offset:], 4)
    end = offset + 4 + 6 * entries
    if end > len(data):
        raise _Refused
    return [data[i : i + 6] for i in range(offset + 4, end, 6)], end


def _mac_table_set(state: NetState, data: bytes) -> Change:
    unicast, end = _mac_table(data, 0)
    multicast, _ = _mac_table(data, end)
    state.filter.set_tables(unicast, multicast)
    return Change.NOTHING


def _mac_addr_set(state: NetState, data: bytes) -> Change:
    if len(data) < 6:
        raise _Refused
    state.filter.mac = data[:6]
    return Change.MAC


def _vlan(*, add: bool) -> Callable[[NetState, bytes], Change]:
    def apply(state: NetState, data: bytes) -> Change:
        vlan = _number(data, 2)
        if vlan > MAX_VLAN:
            raise _Refused
        if add:
            state.filter.vlans.add(vlan)
        else:
            state.filter.vlans.discard(vlan)
        return Change.NOTHING

    return apply


def _announce_ack(state: NetState, data: bytes) -> Change:
    state.announce = False
    return Change.ANNOUNCED


def _vq_pairs_set(state: NetState, data: bytes) -> Change:
    pairs = _number(data, 2)
    if not 1 <= pairs <= state.max_queue_pairs:
        raise _Refused
    state.queue_pairs = pairs
    return Change.QUEUE_PAIRS


def _offloads_set(state: NetState, data: bytes) -> Change:
    offloads = _number(data, 8)
    if offloads & ~(state.features & GUEST_OFFLOADS):
        raise _Refused
    state.guest_offloads = offloads
    return Change.OFFLOADS


_COMMANDS: Final[Mapping[tuple[int, int], tuple[Feature, Callable[[NetState, bytes], Change]]]] = {
    (ControlClass.RX, 0): (Feature.CTRL_RX, _switch("promisc")),
    (ControlClass.RX, 1): (Feature.CTRL_RX, _switch("allmulti")),
    (ControlClass.RX, 2): (Feature.CTRL_RX_EXTRA, _switch("alluni")),
    (ControlClass.RX, 3): (Feature.CTRL_RX_EXTRA, _switch("nomulti")),
    (ControlClass.RX, 4): (Feature.CTRL_RX_EXTRA, _switch("nouni")),
    (ControlClass.RX, 5): (Feature.CTRL_RX_EXTRA, _switch("nobcast")),
    (ControlClass.MAC, 0): (Feature.CTRL_RX, _mac_table_set),
    (ControlClass.MAC, 1): (Feature.CTRL_MAC_ADDR, _mac_addr_set),
    (ControlClass.VLAN, 0): (Feature.CTRL_VLAN, _vlan(add=True)),
    (ControlClass.VLAN, 1): (Feature.CTRL_VLAN, _vlan(add=False)),
    (ControlClass.ANNOUNCE, 0): (Feature.GUEST_ANNOUNCE, _announce_ack),
    (ControlClass.MQ, 0): (Feature.MQ, _vq_pairs_set),
    (ControlClass.GUEST_OFFLOADS, 0): (Feature.CTRL_GUEST_OFFLOADS, _offloads_set),
}
