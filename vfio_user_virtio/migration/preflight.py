"""Whether a target will take what a source saves, said by whoever migrates and by name.

A server refuses a stream with an errno, and the names are in its log.  Who owns both ends can know
more: `Preflight` is given what the target saves of itself, from which follows what fits it
(`virtio.parts_fit`, which is what our device goes by too), and then the source's stream on its way.
With PRE_COPY that is while the source still runs.

It only ever says what a target is sure to refuse.  Streams that cannot be read here, and all that
an image does not tell, are for the target to judge.

Rejected: to compare the two images as `image diff` does, since most of what may differ is state,
and of the rest the device alone knows what it minds.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

from vfio_user_virtio.errors import ClientError, HostError
from vfio_user_virtio.migration.stream import DEVICE_DATA, StreamDecoder
from vfio_user_virtio.virtio.parts import parse_parts_untrusted, strip_kernel_junk
from vfio_user_virtio.virtio.parts_fit import (
    MAX_VECTORS,
    DeviceShape,
    misfits_untrusted,
    shape_of_untrusted,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vfio_user_virtio.protocol.header import Buffer
    from vfio_user_virtio.virtio.parts import Part, PartsError

MAX_NAMED: Final = 4
"""Misfits that one message names: the first are the features and num_queues, and what follows from
those can be hundreds."""


class Preflight:
    """What the target of one migration would refuse; it is told of both ends as they save.

    `shape`: what is known of the target.  As long as that is None, everything passes.
    """

    def __init__(self) -> None:
        self.shape: DeviceShape | None = None
        self._target = StreamDecoder()
        self._source = StreamDecoder()

    def target_saves_untrusted(self, data: Buffer, num_vectors: int | None = None) -> None:
        """The next bytes of what the target saves of itself; how many MSI-X vectors it has, None if
        that is unknown."""
        if num_vectors is None:
            num_vectors = MAX_VECTORS
        try:
            for image in _images_untrusted(self._target, data):
                self.shape = shape_of_untrusted(image, num_vectors)
        except ClientError:
            self.shape = None

    def source_saves_untrusted(self, data: Buffer) -> None:
        """Look at the next bytes of the source's stream, before the target gets them.

        Raises HostError (EX_CONFIG) with the names of what does not fit.
        """
        if self.shape is None:
            return
        try:
            for image in _images_untrusted(self._source, data):
                if misfits := misfits_untrusted(self.shape, image):
                    raise HostError(_refusal(misfits), exit_code=os.EX_CONFIG)
        except ClientError:
            self.shape = None


def _images_untrusted(decoder: StreamDecoder, data: Buffer) -> Iterator[list[Part]]:
    for record in decoder.feed_untrusted(data):
        if record.tag == DEVICE_DATA:
            image, _ = strip_kernel_junk(bytes(record.payload))
            yield parse_parts_untrusted(image)


def _refusal(misfits: list[PartsError]) -> str:
    named = [str(misfit.args[0]) for misfit in misfits[:MAX_NAMED]]
    if len(misfits) > MAX_NAMED:
        named.append(f"and {len(misfits) - MAX_NAMED} more")
    return "the target would refuse what the source has, with: " + "; ".join(named)
