"""Feature bits by number and by name, and which need which (virtio 1.4, Feature Bits; Network
Device, Feature bits; Feature bit requirements).

A feature word is an ``int`` of any width; bit n is feature n.  Names are the standard's, without
the VIRTIO_NET_F_ or VIRTIO_F_ prefix, and are what messages show.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping


class Feature(enum.IntEnum):
    """Bit numbers of the transport's features and of virtio-net's."""

    CSUM = 0
    GUEST_CSUM = 1
    CTRL_GUEST_OFFLOADS = 2
    MTU = 3
    MAC = 5
    GUEST_TSO4 = 7
    GUEST_TSO6 = 8
    GUEST_ECN = 9
    GUEST_UFO = 10
    HOST_TSO4 = 11
    HOST_TSO6 = 12
    HOST_ECN = 13
    HOST_UFO = 14
    MRG_RXBUF = 15
    STATUS = 16
    CTRL_VQ = 17
    CTRL_RX = 18
    CTRL_VLAN = 19
    CTRL_RX_EXTRA = 20
    GUEST_ANNOUNCE = 21
    MQ = 22
    CTRL_MAC_ADDR = 23
    INDIRECT_DESC = 28
    EVENT_IDX = 29
    VERSION_1 = 32
    ACCESS_PLATFORM = 33
    RING_PACKED = 34
    IN_ORDER = 35
    ORDER_PLATFORM = 36
    SR_IOV = 37
    NOTIFICATION_DATA = 38
    NOTIF_CONFIG_DATA = 39
    RING_RESET = 40
    ADMIN_VQ = 41
    SUSPEND = 43
    DEVICE_STATS = 50
    HASH_TUNNEL = 51
    VQ_NOTF_COAL = 52
    NOTF_COAL = 53
    GUEST_USO4 = 54
    GUEST_USO6 = 55
    HOST_USO = 56
    HASH_REPORT = 57
    GUEST_HDRLEN = 59
    RSS = 60
    RSC_EXT = 61
    STANDBY = 62
    SPEED_DUPLEX = 63

    @property
    def mask(self) -> int:
        return 1 << self.value


def mask_of(features: Iterable[Feature]) -> int:
    """The feature word with exactly `features` set."""
    word = 0
    for feature in features:
        word |= 1 << feature
    return word


NEEDS: Final[Mapping[Feature, tuple[Feature, ...]]] = {
    Feature.CTRL_GUEST_OFFLOADS: (Feature.CTRL_VQ,),
    Feature.GUEST_TSO4: (Feature.GUEST_CSUM,),
    Feature.GUEST_TSO6: (Feature.GUEST_CSUM,),
    Feature.GUEST_UFO: (Feature.GUEST_CSUM,),
    Feature.GUEST_USO4: (Feature.GUEST_CSUM,),
    Feature.GUEST_USO6: (Feature.GUEST_CSUM,),
    Feature.HOST_TSO4: (Feature.CSUM,),
    Feature.HOST_TSO6: (Feature.CSUM,),
    Feature.HOST_UFO: (Feature.CSUM,),
    Feature.HOST_USO: (Feature.CSUM,),
    Feature.CTRL_RX: (Feature.CTRL_VQ,),
    Feature.CTRL_VLAN: (Feature.CTRL_VQ,),
    Feature.GUEST_ANNOUNCE: (Feature.CTRL_VQ,),
    Feature.MQ: (Feature.CTRL_VQ,),
    Feature.CTRL_MAC_ADDR: (Feature.CTRL_VQ,),
    Feature.NOTF_COAL: (Feature.CTRL_VQ,),
    Feature.VQ_NOTF_COAL: (Feature.CTRL_VQ,),
    Feature.HASH_TUNNEL: (Feature.CTRL_VQ,),
    Feature.RSS: (Feature.CTRL_VQ,),
}
"""Features that require all of others."""

NEEDS_ONE: Final[Mapping[Feature, tuple[Feature, ...]]] = {
    Feature.GUEST_ECN: (Feature.GUEST_TSO4, Feature.GUEST_TSO6),
    Feature.HOST_ECN: (Feature.HOST_TSO4, Feature.HOST_TSO6),
    Feature.HASH_TUNNEL: (Feature.RSS, Feature.HASH_REPORT),
    Feature.RSC_EXT: (Feature.HOST_TSO4, Feature.HOST_TSO6),
}
"""Features that require at least one of others."""


def feature_names(word: int) -> list[str]:
    """The names of the bits set in `word`, lowest first; an unknown bit n is ``BIT_n``."""
    names: list[str] = []
    bit = 0
    while word >> bit:
        if word >> bit & 1:
            names.append(Feature(bit).name if bit in _KNOWN else f"BIT_{bit}")
        bit += 1
    return names


def refusal_untrusted(offered: int, wanted: int) -> str | None:
    """Why a device that offers `offered` must not accept `wanted`, or None if it may.

    virtio 1.4, Device Initialization: a subset of what was offered, VERSION_1, and every
    feature with those that it requires.
    """
    if surplus := wanted & ~offered:
        return "not offered: " + ", ".join(feature_names(surplus))
    if not wanted >> Feature.VERSION_1 & 1:
        return "VERSION_1 is missing; this is not a transitional device"
    for feature, needed in NEEDS.items():
        if wanted >> feature & 1 and (missing := mask_of(needed) & ~wanted):
            return f"{feature.name} without " + ", ".join(feature_names(missing))
    for feature, choice in NEEDS_ONE.items():
        if wanted >> feature & 1 and not mask_of(choice) & wanted:
            return f"{feature.name} without any of " + ", ".join(f.name for f in choice)
    return None


_KNOWN: Final = frozenset(int(feature) for feature in Feature)
