"""What a member is made from: plain data that is fixed for its life.

Checked here once, so that neither the command line, nor a configuration file, nor a test can build
a member which virtio forbids.
"""

from __future__ import annotations

from typing import Final

import attrs

from vfio_user_virtio import limits
from vfio_user_virtio.errors import ConfigError
from vfio_user_virtio.virtio.features import Feature, feature_names, mask_of, refusal_untrusted

DEFAULT_FEATURES: Final = mask_of(
    (
        Feature.CSUM,
        Feature.GUEST_CSUM,
        Feature.CTRL_GUEST_OFFLOADS,
        Feature.MAC,
        Feature.GUEST_TSO4,
        Feature.GUEST_TSO6,
        Feature.GUEST_ECN,
        Feature.HOST_TSO4,
        Feature.HOST_TSO6,
        Feature.HOST_ECN,
        Feature.MRG_RXBUF,
        Feature.STATUS,
        Feature.CTRL_VQ,
        Feature.CTRL_RX,
        Feature.CTRL_VLAN,
        Feature.CTRL_RX_EXTRA,
        Feature.GUEST_ANNOUNCE,
        Feature.CTRL_MAC_ADDR,
        Feature.INDIRECT_DESC,
        Feature.EVENT_IDX,
        Feature.VERSION_1,
        Feature.ACCESS_PLATFORM,
        Feature.RING_RESET,
        Feature.GUEST_USO4,
        Feature.GUEST_USO6,
        Feature.HOST_USO,
        Feature.SPEED_DUPLEX,
    )
)
"""What a member offers unless told otherwise; MTU and MQ come with `mtu` and `queue_pairs`.

ACCESS_PLATFORM is always there: a guest behind a vIOMMU must give us IOVAs.  RING_PACKED is not:
its indices are in no device part, so it could not migrate.  RSS and HASH_REPORT are not: steering
follows the queue that a flow was last sent on, and a Toeplitz hash per packet costs more in this
process than the guest would gain from it.
"""

OPTIONAL_FEATURES: Final = mask_of((Feature.NOTIFICATION_DATA,))
"""What a member can offer when asked to."""

SPEED_UNKNOWN: Final = 0xFFFF_FFFF


@attrs.frozen(kw_only=True)
class MemberConfig:
    """One member: `member_id` is its VF number, from 1.

    `mac`: 6 bytes, not a group address.  `mtu`: bytes of IP in a frame, offered as feature MTU, or
    None.  `queue_pairs`: RX/TX pairs; more than one offers MQ.  `queue_size`: descriptors of each
    queue, a power of two.  `speed`: Mbit/s as the guest sees it.  `max_tx_rate`: bits per second
    that the guest may send, or None.  `access_vlan`: the VLAN that the member is an access port
    of, or None for a trunk.  `features_off`, `features_on`: feature words taken from and added to
    `DEFAULT_FEATURES`.
    """

    member_id: int = 1
    mac: bytes
    mtu: int | None = None
    queue_pairs: int = 1
    queue_size: int = 256
    speed: int = SPEED_UNKNOWN
    max_tx_rate: int | None = None
    access_vlan: int | None = None
    features_off: int = 0
    features_on: int = 0
    allow_unsealed_memory: bool = False

    def __attrs_post_init__(self) -> None:
        _within("member id", self.member_id, 1, limits.MAX_MEMBERS)
        if len(self.mac) != 6 or self.mac[0] & 1 or not any(self.mac):
            raise ConfigError(
                f"mac {self.mac.hex(':')} is not a unicast address of 6 bytes; "
                "a locally administered one starts with 02"
            )
        if self.mtu is not None:
            _within("mtu", self.mtu, 68, 65_535)
        _within("queue_pairs", self.queue_pairs, 1, limits.MAX_QUEUE_PAIRS)
        _within("queue_size", self.queue_size, 2, limits.MAX_QUEUE_SIZE)
        if self.queue_size & (self.queue_size - 1):
            raise ConfigError(f"queue_size {self.queue_size} is not a power of two; take 256")
        _within("speed", self.speed, 0, SPEED_UNKNOWN)
        if self.max_tx_rate is not None:
            _within("max_tx_rate", self.max_tx_rate, 64_000, 1 << 40)
        if self.access_vlan is not None:
            _within("access_vlan", self.access_vlan, 1, 4_094)
        if unknown := self.features_on & ~(OPTIONAL_FEATURES | DEFAULT_FEATURES):
            raise ConfigError(
                "features_on has what no member can offer: " + ", ".join(feature_names(unknown))
            )
        if contradiction := refusal_untrusted(self.offered, self.offered):
            raise ConfigError(
                f"the features that are left cannot be offered together: {contradiction}; "
                "take both off or neither"
            )

    @property
    def offered(self) -> int:
        """The feature word that the device offers."""
        word = (DEFAULT_FEATURES | self.features_on) & ~self.features_off
        word |= Feature.VERSION_1.mask
        if self.mtu is not None:
            word |= Feature.MTU.mask & ~self.features_off
        if self.queue_pairs > 1:
            word |= Feature.MQ.mask & ~self.features_off
        return word

    @property
    def num_queues(self) -> int:
        """RX and TX queues, and the control queue."""
        return 2 * self.queue_pairs + 1

    @property
    def num_vectors(self) -> int:
        """One MSI-X vector per queue and one for configuration changes."""
        return self.num_queues + 1


def _within(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise ConfigError(f"{name} {value} is out of range; it can be {low} to {high}")
