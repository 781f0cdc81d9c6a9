"""Whole messages as hex, written down from the specification's tables and not from the encoders.

Each vector is decoded and encoded: what the library means by the bytes, and the bytes it makes of
the meaning.  Spaces separate the fields; everything is little-endian.
"""

from __future__ import annotations

import pytest

from vfio_user_virtio.device import (
    U64_END,
    DeviceFlags,
    DeviceInfo,
    DmaAccess,
    DmaMapping,
    FeatureOperation,
    IrqAction,
    IrqFlags,
    IrqInfo,
    IrqRequest,
    LoggingStart,
    RegionFlags,
    RegionInfo,
    SparseArea,
)
from vfio_user_virtio.protocol import (
    device_info,
    dma,
    dma_logging,
    feature,
    header,
    irq,
    migration,
    region,
    region_info,
    region_io_fds,
    version,
)
from vfio_user_virtio.protocol.framing import FrameReader
from vfio_user_virtio.protocol.header import Command

ID = 0x1234


def command(number: Command, payload: bytes = b"", *, no_reply: bool = False) -> str:
    return header.encode_command(ID, number, payload, no_reply=no_reply).hex()


def reply(number: Command, payload: bytes = b"") -> str:
    return header.encode_reply(header.Header(ID, number, 16), payload).hex()


RW = DmaAccess.READ | DmaAccess.WRITE
LARGE = region_info.RegionInfoRequest(0, 4096)
MAPPED = RegionInfo(
    0x10000,
    RegionFlags.READ | RegionFlags.WRITE | RegionFlags.MMAP,
    fd_offset=0x20000,
    areas=(SparseArea(0x1000, 0x3000),),
)
STATE_SET = feature.FeatureRequest(
    feature.Feature.MIG_DEVICE_STATE,
    FeatureOperation.SET,
    migration.encode_device_state(migration.MigrationState.STOP_COPY),
    16,
)
UNMAP = dma.DmaUnmapRequest(0xC0000, 0x8000)

VECTORS = [
    (
        "VERSION reply, all that QEMU may be granted: 16 + 123 + 4 bytes",
        "3412 0100 8f000000 01000000 00000000 0000 0000"
        + (
            b'{"capabilities":{"max_msg_fds":16,"max_data_xfer_size":1048576,"pgsizes":4096,'
            b'"max_dma_maps":65535,"write_multiple":true}}\0'
        ).hex(),
        reply(
            Command.VERSION,
            version.encode_version(
                version.Version(
                    0, 0, version.Capabilities(16, 1 << 20, 4096, 65_535, write_multiple=True)
                )
            ),
        ),
    ),
    (
        "DMA_MAP, read and write, offset 2 MiB, iova 4 GiB, 256 MiB",
        "3412 0200 30000000 00000000 00000000"
        "20000000 03000000 0000200000000000 0000000001000000 0000001000000000",
        command(
            Command.DMA_MAP,
            dma.encode_dma_map_request(DmaMapping(1 << 32, 256 << 20, RW, 5, 2 << 20)),
        ),
    ),
    ("DMA_MAP reply", "3412 0200 10000000 01000000 00000000", reply(Command.DMA_MAP)),
    (
        "DMA_UNMAP, no reply wanted",
        "3412 0300 28000000 10000000 00000000 18000000 0000000000000c0000000000 0080000000000000",
        command(Command.DMA_UNMAP, dma.encode_dma_unmap_request(UNMAP), no_reply=True),
    ),
    (
        "DMA_UNMAP of everything",
        "3412 0300 28000000 00000000 00000000 18000000 020000000000000000000000 0000000000000000",
        command(
            Command.DMA_UNMAP,
            dma.encode_dma_unmap_request(dma.DmaUnmapRequest(0, U64_END, everything=True)),
        ),
    ),
    (
        "DMA_UNMAP reply",
        "3412 0300 28000000 01000000 00000000 18000000 0000000000000c0000000000 0080000000000000",
        reply(Command.DMA_UNMAP, dma.encode_dma_unmap_reply(UNMAP)),
    ),
    (
        "DEVICE_GET_INFO",
        "3412 0400 20000000 00000000 00000000 10000000 00000000 00000000 00000000",
        command(Command.DEVICE_GET_INFO, device_info.encode_device_info_request()),
    ),
    (
        "DEVICE_GET_INFO reply: RESET and PCI, 9 regions, 5 interrupt indices",
        "3412 0400 20000000 01000000 00000000 10000000 03000000 09000000 05000000",
        reply(
            Command.DEVICE_GET_INFO,
            device_info.encode_device_info_reply(
                DeviceInfo(DeviceFlags.RESET | DeviceFlags.PCI, 9, 5)
            ),
        ),
    ),
    (
        "DEVICE_GET_REGION_INFO of the configuration space",
        "3412 0500 30000000 00000000 00000000 20000000 00000000 07000000 00000000"
        "0000000000000000 0000000000000000",
        command(Command.DEVICE_GET_REGION_INFO, region_info.encode_region_info_request(7)),
    ),
    (
        "DEVICE_GET_REGION_INFO reply: a sparse area of 12 KiB",
        "3412 0500 50000000 01000000 00000000 40000000 0f000000 00000000 20000000"
        "0000010000000000 0000020000000000"
        "0100 0100 00000000 01000000 00000000 0010000000000000 0030000000000000",
        reply(
            Command.DEVICE_GET_REGION_INFO,
            region_info.encode_region_info_reply(LARGE, MAPPED)[0],
        ),
    ),
    (
        "DEVICE_GET_REGION_INFO reply for which argsz 32 was too small",
        "3412 0500 30000000 01000000 00000000 40000000 07000000 00000000 00000000"
        "0000010000000000 0000020000000000",
        reply(
            Command.DEVICE_GET_REGION_INFO,
            region_info.encode_region_info_reply(region_info.RegionInfoRequest(0), MAPPED)[0],
        ),
    ),
    (
        "DEVICE_GET_REGION_IO_FDS",
        "3412 0600 20000000 00000000 00000000 38000000 00000000 02000000 00000000",
        command(
            Command.DEVICE_GET_REGION_IO_FDS, region_io_fds.encode_region_io_fds_request(2, 56)
        ),
    ),
    (
        "DEVICE_GET_REGION_IO_FDS reply: one ioeventfd",
        "3412 0600 48000000 01000000 00000000 38000000 00000000 02000000 01000000"
        "0030000000000000 0400000000000000 00000000 00000000 00000000 00000000"
        "0100000000000000",
        reply(
            Command.DEVICE_GET_REGION_IO_FDS,
            region_io_fds.encode_region_io_fds_reply(
                region_io_fds.RegionIoFdsRequest(2, 56),
                [region_io_fds.IoFd(0x3000, 4, 0, region_io_fds.IoFdType.IOEVENTFD, match=1)],
            ),
        ),
    ),
    (
        "DEVICE_GET_IRQ_INFO of MSI-X",
        "3412 0700 20000000 00000000 00000000 10000000 00000000 02000000 00000000",
        command(Command.DEVICE_GET_IRQ_INFO, irq.encode_irq_info_request(2)),
    ),
    (
        "DEVICE_GET_IRQ_INFO reply: 17 vectors by eventfd",
        "3412 0700 20000000 01000000 00000000 10000000 01000000 02000000 11000000",
        reply(
            Command.DEVICE_GET_IRQ_INFO,
            irq.encode_irq_info_reply(2, IrqInfo(17, IrqFlags.EVENTFD)),
        ),
    ),
    (
        "DEVICE_SET_IRQS: arm vectors 3 and 4 (36 bytes, as QEMU sends it)",
        "3412 0800 24000000 00000000 00000000 14000000 24000000 02000000 03000000 02000000",
        command(
            Command.DEVICE_SET_IRQS,
            irq.encode_set_irqs_request(IrqRequest(2, 3, 2, IrqAction.TRIGGER, eventfds=(8, 9))),
        ),
    ),
    (
        "DEVICE_SET_IRQS: mask the first of two",
        "3412 0800 26000000 00000000 00000000 16000000 0a000000 01000000 00000000 0200000001 00",
        command(
            Command.DEVICE_SET_IRQS,
            irq.encode_set_irqs_request(IrqRequest(1, 0, 2, IrqAction.MASK, bools=(True, False))),
        ),
    ),
    (
        "REGION_READ of 4 bytes at 0x10 of BAR 0",
        "3412 0900 20000000 00000000 00000000 1000000000000000 00000000 04000000",
        command(Command.REGION_READ, region.encode_region_read_request(0x10, 0, 4)),
    ),
    (
        "REGION_READ reply",
        "3412 0900 24000000 01000000 00000000 1000000000000000 00000000 04000000 deadbeef",
        region.encode_region_read_reply(ID, 0x10, 0, b"\xde\xad\xbe\xef").hex(),
    ),
    (
        "REGION_WRITE of 2 bytes at 0x3000 of BAR 4, posted",
        "3412 0a00 22000000 10000000 00000000 0030000000000000 04000000 02000000 0100",
        command(
            Command.REGION_WRITE,
            region.encode_region_write_request(0x3000, 4, b"\1\0"),
            no_reply=True,
        ),
    ),
    (
        "REGION_WRITE reply",
        "3412 0a00 20000000 01000000 00000000 0030000000000000 04000000 02000000",
        region.encode_region_write_reply(ID, 0x3000, 4, 2).hex(),
    ),
    (
        "DMA_READ of 64 KiB at 4 GiB",
        "3412 0b00 20000000 00000000 00000000 0000000001000000 0000010000000000",
        command(Command.DMA_READ, dma.encode_dma_read_request(1 << 32, 1 << 16)),
    ),
    (
        "DMA_READ reply",
        "3412 0b00 23000000 01000000 00000000 0000000001000000 0300000000000000 616263",
        reply(Command.DMA_READ, dma.encode_dma_read_reply(1 << 32, b"abc")),
    ),
    (
        "DMA_WRITE",
        "3412 0c00 23000000 00000000 00000000 0000000001000000 0300000000000000 616263",
        command(Command.DMA_WRITE, dma.encode_dma_write_request(1 << 32, b"abc")),
    ),
    (
        "DMA_WRITE reply: the count has 8 bytes",
        "3412 0c00 20000000 01000000 00000000 0000000001000000 0300000000000000",
        reply(Command.DMA_WRITE, dma.encode_dma_write_reply(1 << 32, 3)),
    ),
    (
        "DEVICE_RESET",
        "3412 0d00 10000000 00000000 00000000",
        command(Command.DEVICE_RESET),
    ),
    (
        "REGION_WRITE_MULTI of two writes, posted",
        "3412 0f00 48000000 10000000 00000000 0200000000000000"
        "0030000000000000 04000000 02000000 0100000000000000"
        "0830000000000000 04000000 08000000 0102030405060708",
        command(
            Command.REGION_WRITE_MULTI,
            region.encode_region_write_multi_request(
                [(0x3000, 4, b"\1\0"), (0x3008, 4, b"\1\2\3\4\5\6\7\10")]
            ),
            no_reply=True,
        ),
    ),
    (
        "REGION_WRITE_MULTI reply",
        "3412 0f00 18000000 01000000 00000000 0200000000000000",
        reply(Command.REGION_WRITE_MULTI, region.encode_region_write_multi_reply(2)),
    ),
    (
        "DEVICE_FEATURE: SET MIG_DEVICE_STATE to STOP_COPY",
        "3412 1000 20000000 00000000 00000000 10000000 02000200 03000000 ffffffff",
        command(Command.DEVICE_FEATURE, feature.encode_feature_request(STATE_SET)),
    ),
    (
        "DEVICE_FEATURE reply: GET MIGRATION, STOP_COPY and PRE_COPY",
        "3412 1000 20000000 01000000 00000000 10000000 01000100 0500000000000000",
        reply(
            Command.DEVICE_FEATURE,
            feature.encode_feature_reply(
                feature.FeatureRequest(1, FeatureOperation.GET, b"", 16),
                migration.encode_migration_flags(
                    migration.MigrationFlags.STOP_COPY | migration.MigrationFlags.PRE_COPY
                ),
            ),
        ),
    ),
    (
        "DEVICE_FEATURE: SET DMA_LOGGING_START in 4 KiB pages for one range",
        "3412 1000 38000000 00000000 00000000 28000000 06000200"
        "0010000000000000 01000000 00000000 0000000001000000 0000001000000000",
        command(
            Command.DEVICE_FEATURE,
            feature.encode_feature_request(
                feature.FeatureRequest(
                    feature.Feature.DMA_LOGGING_START,
                    FeatureOperation.SET,
                    dma_logging.encode_logging_start(LoggingStart(4096, ((1 << 32, 256 << 20),))),
                    40,
                )
            ),
        ),
    ),
    (
        "MIG_DATA_READ of 256 bytes",
        "3412 1100 18000000 00000000 00000000 08010000 00010000",
        command(Command.MIG_DATA_READ, migration.encode_migration_read_request(256)),
    ),
    (
        "MIG_DATA_READ reply: 3 bytes and no more just now",
        "3412 1100 1b000000 01000000 00000000 0b000000 03000000 616263",
        reply(Command.MIG_DATA_READ, migration.encode_migration_data_head(3) + b"abc"),
    ),
    (
        "MIG_DATA_WRITE",
        "3412 1200 1b000000 00000000 00000000 0b000000 03000000 616263",
        command(Command.MIG_DATA_WRITE, migration.encode_migration_data_head(3) + b"abc"),
    ),
    (
        "an error reply: EEXIST",
        "3412 0200 10000000 21000000 11000000",
        header.encode_error_reply(header.Header(ID, Command.DMA_MAP, 48), 17).hex(),
    ),
]


@pytest.mark.parametrize(
    ("golden", "encoded"), [vector[1:] for vector in VECTORS], ids=[v[0] for v in VECTORS]
)
def test_encoders(golden: str, encoded: str) -> None:
    assert encoded == golden.replace(" ", "")


@pytest.mark.parametrize("golden", [v[1] for v in VECTORS], ids=[v[0] for v in VECTORS])
def test_each_vector_is_one_message(golden: str) -> None:
    message = bytes.fromhex(golden)
    (frame,) = FrameReader().receive(message, [])
    assert frame.message_id == ID
    assert frame.payload == message[16:]


def payload(name: str) -> bytes:
    """The payload of the one vector with this name."""
    (found,) = (golden for title, golden, _ in VECTORS if title.split(":")[0] == name)
    return bytes.fromhex(found)[16:]


def test_decoders_of_requests() -> None:
    assert dma.decode_dma_map_request_untrusted(
        payload("DMA_MAP, read and write, offset 2 MiB, iova 4 GiB, 256 MiB"), [5]
    ) == DmaMapping(1 << 32, 256 << 20, RW, 5, 2 << 20)
    assert dma.decode_dma_unmap_request_untrusted(payload("DMA_UNMAP, no reply wanted")) == UNMAP
    assert dma.decode_dma_unmap_request_untrusted(payload("DMA_UNMAP of everything")).everything
    device_info.decode_device_info_request_untrusted(payload("DEVICE_GET_INFO"))
    assert region_info.decode_region_info_request_untrusted(
        payload("DEVICE_GET_REGION_INFO of the configuration space")
    ) == region_info.RegionInfoRequest(7, 32)
    assert region_io_fds.decode_region_io_fds_request_untrusted(
        payload("DEVICE_GET_REGION_IO_FDS")
    ) == region_io_fds.RegionIoFdsRequest(2, 56)
    assert irq.decode_irq_info_request_untrusted(payload("DEVICE_GET_IRQ_INFO of MSI-X")) == 2
    assert irq.decode_set_irqs_request_untrusted(
        bytes.fromhex("14000000 24000000 02000000 03000000 02000000"), [8, 9]
    ) == IrqRequest(2, 3, 2, IrqAction.TRIGGER, eventfds=(8, 9))
    assert region.decode_region_read_request_untrusted(
        payload("REGION_READ of 4 bytes at 0x10 of BAR 0")
    ) == (0x10, 0, 4)
    assert region.decode_region_write_request_untrusted(
        payload("REGION_WRITE of 2 bytes at 0x3000 of BAR 4, posted")
    ) == (0x3000, 4, 2)
    assert region.decode_region_write_multi_request_untrusted(
        payload("REGION_WRITE_MULTI of two writes, posted")
    ) == [(0x3000, 4, b"\1\0"), (0x3008, 4, b"\1\2\3\4\5\6\7\10")]
    assert dma.decode_dma_read_request_untrusted(payload("DMA_READ of 64 KiB at 4 GiB")) == (
        1 << 32,
        1 << 16,
    )
    assert dma.decode_dma_write_request_untrusted(payload("DMA_WRITE")) == (1 << 32, 3)
    assert (
        migration.decode_migration_read_request_untrusted(payload("MIG_DATA_READ of 256 bytes"))
        == 256
    )
    assert migration.decode_migration_write_request_untrusted(payload("MIG_DATA_WRITE")) == 3


def test_decoders_of_replies() -> None:
    assert device_info.decode_device_info_reply_untrusted(
        payload("DEVICE_GET_INFO reply")
    ) == DeviceInfo(DeviceFlags.RESET | DeviceFlags.PCI, 9, 5)
    assert (
        region_info.decode_region_info_reply_untrusted(payload("DEVICE_GET_REGION_INFO reply")).info
        == MAPPED
    )
    assert irq.decode_irq_info_reply_untrusted(payload("DEVICE_GET_IRQ_INFO reply"), 2) == IrqInfo(
        17, IrqFlags.EVENTFD
    )
    assert (
        region.decode_region_read_reply_untrusted(payload("REGION_READ reply"), 4)
        == b"\xde\xad\xbe\xef"
    )
    region.decode_region_write_reply_untrusted(payload("REGION_WRITE reply"), 2)
    assert dma.decode_dma_read_reply_untrusted(payload("DMA_READ reply"), 3) == b"abc"
    dma.decode_dma_write_reply_untrusted(payload("DMA_WRITE reply"), 3)
    assert (
        migration.decode_migration_read_reply_untrusted(payload("MIG_DATA_READ reply"), 9) == b"abc"
    )
