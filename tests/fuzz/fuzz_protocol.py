"""Any bytes, cut anyhow, with any fds: frames, ClientError or ConnectionLost; no fd is lost.

That is: `FrameReader` and every decoder of `protocol/` answer hostile input with a value or with
exactly these exceptions; frames are the same however the input is cut into reads; and every fd
that came in can be found again, once, in a frame or in the reader.

Run it with ``python -m tests.fuzz.fuzz_protocol -max_total_time=60`` (atheris, libFuzzer's
options); the tests run `one_input` on hypothesis' bytes.

Input: a byte n, then n pairs of a cut (1…255 bytes to the next) and a number of fds (its low two
bits), then the stream.  Message sizes are whatever the stream says, except that a size field the
fuzzer got nearly right is of no use to it, so bit 7 of n makes the rest one payload for all
decoders instead of a stream.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import sys
from typing import TYPE_CHECKING, Final

from vfio_user_virtio.device import FeatureOperation, LoggingReport
from vfio_user_virtio.errors import ClientError, ConnectionLost
from vfio_user_virtio.limits import MAX_ANCILLARY_FDS
from vfio_user_virtio.protocol import (
    device_info,
    dma,
    dma_logging,
    feature,
    irq,
    migration,
    region,
    region_info,
    region_io_fds,
    version,
)
from vfio_user_virtio.protocol.framing import Frame, FrameReader
from vfio_user_virtio.protocol.header import Command

if TYPE_CHECKING:
    from collections.abc import Callable

    Decoder = Callable[[bytes, list[int]], object]

GET_STATE: Final = feature.FeatureRequest(2, FeatureOperation.GET, b"", 16)
REPORT: Final = LoggingReport(0, 1 << 20, 4096)
UNMAP: Final = dma.DmaUnmapRequest(0, 4096, dirty_pgsize=4096, bitmap_size=8)

REQUESTS: Final[dict[int, Decoder]] = {
    Command.VERSION: lambda p, fds: version.negotiate(
        version.decode_version_request_untrusted(p, len(fds))
    ),
    Command.DMA_MAP: dma.decode_dma_map_request_untrusted,
    Command.DMA_UNMAP: lambda p, _: dma.decode_dma_unmap_request_untrusted(p),
    Command.DEVICE_GET_INFO: lambda p, _: device_info.decode_device_info_request_untrusted(p),
    Command.DEVICE_GET_REGION_INFO: lambda p, _: region_info.decode_region_info_request_untrusted(
        p
    ),
    Command.DEVICE_GET_REGION_IO_FDS: lambda p, _: (
        region_io_fds.decode_region_io_fds_request_untrusted(p)
    ),
    Command.DEVICE_GET_IRQ_INFO: lambda p, _: irq.decode_irq_info_request_untrusted(p),
    Command.DEVICE_SET_IRQS: irq.decode_set_irqs_request_untrusted,
    Command.REGION_READ: lambda p, _: region.decode_region_read_request_untrusted(p),
    Command.REGION_WRITE: lambda p, _: region.decode_region_write_request_untrusted(p),
    Command.DMA_READ: lambda p, _: dma.decode_dma_read_request_untrusted(p),
    Command.DMA_WRITE: lambda p, _: dma.decode_dma_write_request_untrusted(p),
    Command.REGION_WRITE_MULTI: lambda p, _: region.decode_region_write_multi_request_untrusted(p),
    Command.DEVICE_FEATURE: lambda p, _: decode_feature_and_data(p),
    Command.MIG_DATA_READ: lambda p, _: migration.decode_migration_read_request_untrusted(p),
    Command.MIG_DATA_WRITE: lambda p, _: migration.decode_migration_write_request_untrusted(p),
}

REPLIES: Final[dict[int, Decoder]] = {
    Command.VERSION: lambda p, fds: version.decode_version_reply_untrusted(p, len(fds)),
    Command.DMA_UNMAP: lambda p, _: dma.decode_dma_unmap_reply_untrusted(p, UNMAP),
    Command.DEVICE_GET_INFO: lambda p, _: device_info.decode_device_info_reply_untrusted(p),
    Command.DEVICE_GET_REGION_INFO: lambda p, _: region_info.decode_region_info_reply_untrusted(p),
    Command.DEVICE_GET_REGION_IO_FDS: lambda p, fds: (
        region_io_fds.decode_region_io_fds_reply_untrusted(p, len(fds))
    ),
    Command.DEVICE_GET_IRQ_INFO: lambda p, _: irq.decode_irq_info_reply_untrusted(p, 2),
    Command.REGION_READ: lambda p, _: region.decode_region_read_reply_untrusted(p, 4),
    Command.REGION_WRITE: lambda p, _: region.decode_region_write_reply_untrusted(p, 4),
    Command.DMA_READ: lambda p, _: dma.decode_dma_read_reply_untrusted(p, 4),
    Command.DMA_WRITE: lambda p, _: dma.decode_dma_write_reply_untrusted(p, 4),
    Command.REGION_WRITE_MULTI: lambda p, _: region.decode_region_write_multi_reply_untrusted(p),
    Command.DEVICE_FEATURE: lambda p, _: migration.decode_device_state_reply_untrusted(
        feature.decode_feature_reply_untrusted(p, GET_STATE).data
    ),
    Command.MIG_DATA_READ: lambda p, _: migration.decode_migration_read_reply_untrusted(p, 4),
}

FEATURE_DATA: Final[dict[int, Callable[[bytes], object]]] = {
    feature.Feature.MIGRATION: migration.decode_migration_flags_untrusted,
    feature.Feature.MIG_DEVICE_STATE: migration.decode_device_state_request_untrusted,
    feature.Feature.DMA_LOGGING_START: dma_logging.decode_logging_start_untrusted,
    feature.Feature.DMA_LOGGING_REPORT: dma_logging.decode_logging_report_untrusted,
    feature.Feature.MIG_DATA_SIZE: migration.decode_data_size_untrusted,
}


def decode_feature_and_data(payload: bytes) -> None:
    request = feature.decode_feature_request_untrusted(payload)
    assert feature.encode_feature_request(request) == payload
    decode = FEATURE_DATA.get(request.index)
    if decode is not None:
        decode(request.data)
    if request.index == feature.Feature.DMA_LOGGING_REPORT:
        dma_logging.decode_logging_report_reply_untrusted(request.data, REPORT)


def decode_any(decode: Decoder, payload: bytes, fds: list[int]) -> None:
    """The one place that says which exceptions may come out of a decoder."""
    before = list(fds)
    with contextlib.suppress(ClientError, ConnectionLost):
        decode(payload, fds)
    assert fds == before, "a decoder takes no fd away"


def decode_frame(frame: Frame) -> None:
    decode = (REPLIES if frame.is_reply else REQUESTS).get(frame.command)
    if decode is not None:
        decode_any(decode, frame.payload, frame.fds)


def read_all(reads: list[tuple[bytes, list[int]]]) -> tuple[list[Frame], FrameReader]:
    reader = FrameReader()
    frames: list[Frame] = []
    for data, fds in reads:
        try:
            frames += reader.receive(data, list(fds))
        except ConnectionLost:
            assert reader.broken is not None
            assert reader.partial
    return frames, reader


def contents(frames: list[Frame]) -> list[tuple[int, int, int, int, bytes]]:
    return [(f.message_id, f.command, f.flags, f.error, f.payload) for f in frames]


def one_input(data: bytes) -> None:
    """One run of the fuzz target.  AssertionError or any other exception is a finding."""
    if not data:
        return
    count, data = data[0], data[1:]
    if count & 0x80:
        fds = list(range(count & 3))
        for decode in itertools.chain(REQUESTS.values(), REPLIES.values()):
            decode_any(decode, data, fds)
        return
    plan, stream = data[: 2 * count], data[2 * count :]
    numbers = itertools.count()
    reads: list[tuple[bytes, list[int]]] = []
    position = 0
    for cut, num_fds in zip(plan[::2], plan[1::2], strict=False):
        piece = stream[position : position + max(cut, 1)]
        reads.append((piece, list(itertools.islice(numbers, num_fds & 3))))
        position += len(piece)
    reads.append((stream[position:], []))

    frames, reader = read_all(reads)
    for frame in frames:
        decode_frame(frame)
    found = sorted([fd for frame in frames for fd in frame.take_fds()] + reader.take_fds())
    assert found == [fd for _, fds in reads for fd in fds], "every fd is found again, once"
    if len(found) > MAX_ANCILLARY_FDS:
        return  # more than one message may bring: where that breaks depends on the reads

    whole, whole_reader = read_all([(stream, [])])
    assert contents(whole) == contents(frames), "however it is cut"
    single, single_reader = read_all([(stream[i : i + 1], []) for i in range(len(stream))])
    assert contents(single) == contents(whole), "even into bytes"
    assert (
        (reader.broken is None) == (whole_reader.broken is None) == (single_reader.broken is None)
    )
    assert reader.partial == whole_reader.partial == single_reader.partial


def main() -> None:
    atheris = importlib.import_module("atheris")  # has no types, and is not there on Python 3.14
    atheris.instrument_all()
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
