"""Unfinished frames: what a virtio_net_hdr asks for, and doing it in software.

A driver, or a TAP device, may hand over a frame whose transport checksum is still to be computed
(NEEDS_CSUM), or one that is still to be cut into segments (a GSO type).  Who takes such frames
gets them as they are; for who does not, this module finishes them: `unfinished` tells what a header
asks for, `finish_untrusted` does it.  Modelled on the kernel's virtio_net_hdr_to_skb (what is
refused), skb_checksum_help and tcp_gso_segment (what is done); virtio 1.4, Network Device, Device
Operation, Packet Transmission.

The header comes from a guest.  One that asks for nonsense loses its frame, as with a NIC: that is
counted and is no DriverError.  A checksum may be put nowhere into the Ethernet header or the VLAN
tag, since the switch has decided by those.  `hdr_len` is never believed: headers are parsed.

`virtio_net_hdr`, 12 bytes, little-endian:

    0  1  flags        NEEDS_CSUM 1, DATA_VALID 2
    1  1  gso_type     NONE 0, TCPV4 1, TCPV6 4, UDP_L4 5; ECN 0x80 may be added
    2  2  hdr_len      a hint
    4  2  gso_size     payload bytes of each segment but the last
    6  2  csum_start   from the Ethernet header on, where the checksum's range begins
    8  2  csum_offset  from csum_start on, where it is stored
    10 2  num_buffers  the receiving port's business
"""

from __future__ import annotations

import struct
from typing import Final

import attrs

from vfio_user_virtio import limits
from vfio_user_virtio.virtio.checksum import ipv4_checksum, transport_checksum, words_sum
from vfio_user_virtio.virtio.features import Feature

NET_HEADER: Final = struct.Struct("<BBHHHHH")
assert NET_HEADER.size == 12
NO_NET_HEADER: Final = bytes(NET_HEADER.size)

F_NEEDS_CSUM: Final = 1
F_DATA_VALID: Final = 2
GSO_TCPV4: Final = 1
GSO_TCPV6: Final = 4
GSO_UDP_L4: Final = 5
GSO_ECN: Final = 0x80

CSUM: Final = Feature.GUEST_CSUM.mask
TSO4: Final = Feature.GUEST_TSO4.mask
TSO6: Final = Feature.GUEST_TSO6.mask
ECN: Final = Feature.GUEST_ECN.mask
USO4: Final = Feature.GUEST_USO4.mask
USO6: Final = Feature.GUEST_USO6.mask
GSO: Final = TSO4 | TSO6 | USO4 | USO6
EVERYTHING: Final = CSUM | GSO | ECN

INVALID: Final = 1 << 62
"""In the answer of `unfinished`: the header asks for nonsense."""

STRAY_FLAGS: Final = 1 << 61
"""In the answer of `unfinished`: flags other than NEEDS_CSUM are set, such as DATA_VALID."""

TPID: Final = b"\x81\x00"
ETHERTYPE_IPV4: Final = b"\x08\x00"
ETHERTYPE_IPV6: Final = b"\x86\xdd"

_GSO_NEEDS: Final[dict[tuple[int, bytes], int]] = {
    (GSO_TCPV4, ETHERTYPE_IPV4): TSO4,
    (GSO_TCPV4 | GSO_ECN, ETHERTYPE_IPV4): TSO4 | ECN,
    (GSO_TCPV6, ETHERTYPE_IPV6): TSO6,
    (GSO_TCPV6 | GSO_ECN, ETHERTYPE_IPV6): TSO6 | ECN,
    (GSO_UDP_L4, ETHERTYPE_IPV4): USO4,
    (GSO_UDP_L4, ETHERTYPE_IPV6): USO6,
}
_CSUM_PLACE: Final = struct.Struct("<HH")
_TAG_SIZE: Final = 4
_MAX_CSUM_START: Final = 0xFFFF - _TAG_SIZE  # room for a tag that is put in front

_NET: Final = NET_HEADER.size
_ETHERNET_SIZE: Final = 14
_TCP: Final = 6
_UDP: Final = 17
_CSUM_OFFSET: Final = {_TCP: 16, _UDP: 6}
_TCP_CWR: Final = 0x80
_TCP_LAST_ONLY: Final = 0x01 | 0x08  # FIN, PSH
_SKIPPED_IPV6_HEADERS: Final = frozenset((0, 60))  # hop-by-hop and destination options
_MAX_IPV6_HEADERS: Final = 8


def unfinished(head: bytes | bytearray | memoryview, size: int) -> int:
    """What a port must take so that it can be sent this frame as it is: feature bits, or INVALID.

    `head` is the virtio_net_hdr and the first bytes of a frame of `size` bytes, header included:
    at least 30, or the whole frame if it is shorter; never less than 26.  Looks at nothing that
    the guest could still change.
    """
    flags = head[0]
    gso_type = head[1]
    needs = 0
    ethertype = head[24:26]
    tagged = ethertype == TPID
    if flags & F_NEEDS_CSUM:
        start, offset = _CSUM_PLACE.unpack_from(head, 6)
        first = _ETHERNET_SIZE + _TAG_SIZE if tagged else _ETHERNET_SIZE
        if not first <= start <= _MAX_CSUM_START or start + offset + 2 > size - _NET:
            return INVALID
        needs = CSUM
    if gso_type:
        if not head[4] | head[5]:
            return INVALID
        needs |= _GSO_NEEDS.get((gso_type, bytes(head[28:30] if tagged else ethertype)), INVALID)
    if flags & ~F_NEEDS_CSUM:
        needs |= STRAY_FLAGS
    return needs


def without_stray_flags(head: bytes, keep: int = F_NEEDS_CSUM) -> bytes:
    """The same head with no flags but those of `keep`."""
    return bytes((head[0] & keep,)) + head[1:]


def finish_untrusted(data: bytes) -> list[tuple[list[bytes | memoryview], int]] | None:
    """Finish a frame: the complete frames that it stands for, or None if it makes no sense.

    `data` is a virtio_net_hdr and an Ethernet frame in private memory.  Each result is a scatter
    list, whose first element holds all headers and an empty virtio_net_hdr, and its size in bytes.
    Payload of segments is shared with `data`, not copied.
    """
    if len(data) < _NET + _ETHERNET_SIZE or unfinished(data, len(data)) & INVALID:
        return None
    flags, gso_type, _, gso_size, start, offset, _ = NET_HEADER.unpack_from(data)
    if gso_type:
        layout = _parse_untrusted(data)
        if layout is None:
            return None
        if flags & F_NEEDS_CSUM and (
            start != layout.transport - _NET or offset != _CSUM_OFFSET[layout.protocol]
        ):
            return None
        return _segment(data, layout, gso_size)
    if not flags & F_NEEDS_CSUM:
        return [([NO_NET_HEADER + data[_NET:]], len(data))]
    view = memoryview(data)
    checksum = transport_checksum(words_sum(view[_NET + start :]))
    place = _NET + start + offset
    whole = b"".join(
        (NO_NET_HEADER, view[_NET:place], checksum.to_bytes(2, "big"), view[place + 2 :])
    )
    return [([whole], len(whole))]


@attrs.frozen
class _Layout:
    """Where the headers of a frame are; offsets from the start of its virtio_net_hdr."""

    network: int
    transport: int
    payload: int
    protocol: int
    ipv4: bool


def _parse_untrusted(data: bytes) -> _Layout | None:
    """Find the headers of a TCP or UDP frame; None if they are not there as they should be."""
    ethertype = data[24:26]
    network = _NET + _ETHERNET_SIZE
    if ethertype == TPID:
        ethertype = data[28:30]
        network += _TAG_SIZE
    ipv4 = ethertype == ETHERTYPE_IPV4
    if ipv4:
        if len(data) < network + 20 or data[network] >> 4 != 4:
            return None
        header_size = (data[network] & 0xF) * 4
        is_fragment = (data[network + 6] & 0x3F) | data[network + 7]
        if header_size < 20 or is_fragment:
            return None
        protocol = data[network + 9]
        transport = network + header_size
    else:
        if len(data) < network + 40 or data[network] >> 4 != 6:
            return None
        protocol = data[network + 6]
        transport = network + 40
        for _ in range(_MAX_IPV6_HEADERS):
            if protocol not in _SKIPPED_IPV6_HEADERS or len(data) < transport + 8:
                break
            protocol, length = data[transport], data[transport + 1]
            transport += (length + 1) * 8
    wanted = _UDP if data[1] & ~GSO_ECN == GSO_UDP_L4 else _TCP
    smallest = 8 if wanted == _UDP else 20
    if protocol != wanted or len(data) < transport + smallest:
        return None
    size = 8 if wanted == _UDP else (data[transport + 12] >> 4) * 4
    payload = transport + size
    if size < smallest or len(data) < payload:
        return None
    return _Layout(network, transport, payload, protocol, ipv4)


def _segment(
    data: bytes, layout: _Layout, gso_size: int
) -> list[tuple[list[bytes | memoryview], int]] | None:
    """Cut a frame into segments of `gso_size` payload bytes, each with its own headers."""
    network, transport, payload = layout.network, layout.transport, layout.payload
    is_tcp = layout.protocol == _TCP
    total = len(data) - payload
    largest = payload - network + min(gso_size, total)
    if total > gso_size * limits.MAX_GSO_SEGMENTS or largest > 0xFFFF:
        return None

    view = memoryview(data)
    headers = bytearray(data[:payload])
    headers[:_NET] = NO_NET_HEADER
    checksum_at = transport + _CSUM_OFFSET[layout.protocol]
    addresses = (
        headers[network + 12 : network + 20] if layout.ipv4 else headers[network + 8 : network + 40]
    )
    pseudo_sum = words_sum(addresses) + layout.protocol
    identification = int.from_bytes(headers[network + 4 : network + 6], "big")
    sequence = int.from_bytes(headers[transport + 4 : transport + 8], "big")
    tcp_flags = headers[transport + 13] if is_tcp else 0

    frames: list[tuple[list[bytes | memoryview], int]] = []
    for index, begin in enumerate(range(0, max(total, 1), gso_size)):
        piece = view[payload + begin : payload + begin + gso_size]
        ends_here = begin + gso_size >= total
        end = payload + len(piece)
        if layout.ipv4:
            headers[network + 2 : network + 4] = (end - network).to_bytes(2, "big")
            headers[network + 4 : network + 6] = (identification + index & 0xFFFF).to_bytes(
                2, "big"
            )
            headers[network + 10 : network + 12] = b"\0\0"
            checksum = ipv4_checksum(words_sum(headers[network:transport]))
            headers[network + 10 : network + 12] = checksum.to_bytes(2, "big")
        else:
            headers[network + 4 : network + 6] = (end - network - 40).to_bytes(2, "big")
        length = end - transport
        if is_tcp:
            here = (sequence + begin) & 0xFFFF_FFFF
            headers[transport + 4 : transport + 8] = here.to_bytes(4, "big")
            flags = tcp_flags
            if index:
                flags &= ~_TCP_CWR
            if not ends_here:
                flags &= ~_TCP_LAST_ONLY
            headers[transport + 13] = flags
        else:
            headers[transport + 4 : transport + 6] = length.to_bytes(2, "big")
        headers[checksum_at : checksum_at + 2] = b"\0\0"
        checksum = transport_checksum(
            pseudo_sum + length + words_sum(headers[transport:]) + words_sum(piece)
        )
        headers[checksum_at : checksum_at + 2] = checksum.to_bytes(2, "big")
        frames.append(([bytes(headers), piece], end))
    return frames
