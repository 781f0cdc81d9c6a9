"""What a served PF is made from: plain data, apart from the function that is made from it, so that
reading a configuration loads no more than that.
"""

from __future__ import annotations

from typing import Final

import attrs

from vfio_user_virtio import limits
from vfio_user_virtio.virtio.features import Feature, mask_of

OWNER_FEATURES: Final = mask_of(
    (
        Feature.MAC,
        Feature.STATUS,
        Feature.INDIRECT_DESC,
        Feature.EVENT_IDX,
        Feature.VERSION_1,
        Feature.ACCESS_PLATFORM,
        Feature.ADMIN_VQ,
    )
)
NET_QUEUES: Final = 2
ADMIN_QUEUE: Final = NET_QUEUES
"""Index of the administration virtqueue: behind the queue pair."""


@attrs.frozen(kw_only=True)
class OwnerFunctionConfig:
    """A served PF; a `FunctionConfig`.

    `mac`: 6 bytes.  `sr_iov`: offer SR_IOV.  `features_off`: a feature word that is not offered.
    `linux_compat`: do as Linux's driver expects where that departs from the standard; see
    `Administration`.  Without it that driver finds no device parts.
    """

    mac: bytes
    sr_iov: bool = False
    features_off: int = 0
    linux_compat: bool = True
    queue_size: int = limits.ADMIN_RING_SIZE
    allow_unsealed_memory: bool = False

    @property
    def offered(self) -> int:
        word = OWNER_FEATURES | (Feature.SR_IOV.mask if self.sr_iov else 0)
        return word & ~self.features_off | Feature.VERSION_1.mask

    @property
    def num_queues(self) -> int:
        return NET_QUEUES

    @property
    def num_vectors(self) -> int:
        return NET_QUEUES + 2
