"""VLANs at a port of the switch: who is in which, and putting 802.1Q tags on and taking them off.

An access port belongs to one VLAN and its guest knows nothing of it: frames are untagged on the
guest's side and tagged on the uplink's, and what the guest tags itself is dropped, so that it
cannot reach another VLAN.  A trunk port carries tags as they are, all or those it is allowed.  VLAN
0 stands for untagged (and priority-tagged) frames on trunks; it is one more VLAN, so an untagged
frame never reaches an access port.  Modelled on a VF's VLAN of `ip link set … vf … vlan` and IEEE
802.1Q.  802.1ad service tags are payload here.
"""

from __future__ import annotations

import struct
from typing import Final

import attrs

from vfio_user_virtio.backends.software.ports import HEAD_SIZE, MIN_FRAME_SIZE, Buffer, Frame
from vfio_user_virtio.errors import ConfigError
from vfio_user_virtio.virtio.offload import F_NEEDS_CSUM, NET_HEADER, TPID

TAG_SIZE: Final = 4
_TAG_AT: Final = MIN_FRAME_SIZE - 2  # where the EtherType is
_VID_AT: Final = _TAG_AT + 2
_U16: Final = struct.Struct(">H")


def _check_access(_instance: object, _attribute: object, value: int | None) -> None:
    if value is not None and not 1 <= value <= 4_094:
        raise ConfigError(f"access VLAN {value} is not in 1 … 4094")


def _check_allowed(_instance: object, _attribute: object, value: frozenset[int] | None) -> None:
    if value is not None and (wrong := [vid for vid in value if not 0 <= vid <= 4_094]):
        raise ConfigError(f"VLANs {sorted(wrong)} are not in 0 … 4094; 0 stands for untagged")


@attrs.frozen(kw_only=True)
class PortVlans:
    """`access`: the VLAN of an access port.  `allowed`: those of a trunk; None means all.

    Raises ConfigError for a VLAN that cannot be.
    """

    access: int | None = attrs.field(default=None, validator=_check_access)
    allowed: frozenset[int] | None = attrs.field(default=None, validator=_check_allowed)

    @property
    def is_plain(self) -> bool:
        """Whether every frame passes as it is."""
        return self.access is None and self.allowed is None

    def carries(self, vlan: int) -> bool:
        """Whether frames of this VLAN belong on the port."""
        if self.access is not None:
            return vlan == self.access
        return self.allowed is None or vlan in self.allowed


ANY_VLAN: Final = PortVlans()


def vlan_of(head: Buffer) -> int | None:
    """The VLAN that a frame is tagged with; None for an untagged one.  ValueError if cut off."""
    if head[_TAG_AT:_VID_AT] != TPID:
        return None
    if len(head) < _VID_AT + 2:
        raise ValueError("the frame ends inside its tag")
    return (head[_VID_AT] << 8 | head[_VID_AT + 1]) & 0xFFF


def push_tag(frame: Frame, vlan: int) -> Frame:
    """The frame with a tag; it is `TAG_SIZE` longer.  Priority is 0."""
    head = bytes(frame[0])
    tagged = head[:_TAG_AT] + TPID + _U16.pack(vlan) + head[_TAG_AT:]
    return [_shift_header(tagged, TAG_SIZE), *frame[1:]]


def pop_tag(frame: Frame) -> Frame:
    """The frame without its outermost tag; it is `TAG_SIZE` shorter."""
    head = bytes(frame[0])
    untagged = _shift_header(head[:_TAG_AT] + head[_TAG_AT + TAG_SIZE :], -TAG_SIZE)
    rest = list(frame[1:])
    while rest and len(untagged) < HEAD_SIZE:  # the head must stay whole
        missing = HEAD_SIZE - len(untagged)
        untagged += bytes(rest[0][:missing])
        rest[0] = rest[0][missing:]
        if not len(rest[0]):
            del rest[0]
    return [untagged, *rest]


def _shift_header(head: bytes, by: int) -> bytes:
    """The same head, with what its virtio_net_hdr says of offsets moved by the size of a tag."""
    flags, gso_type, hdr_len, gso_size, start, offset, buffers = NET_HEADER.unpack_from(head)
    if flags & F_NEEDS_CSUM:
        start += by  # `unfinished` has left room for it
    if hdr_len:
        hdr_len = min(max(hdr_len + by, 0), 0xFFFF)
    header = NET_HEADER.pack(flags, gso_type, hdr_len, gso_size, start, offset, buffers)
    return header + head[NET_HEADER.size :]
