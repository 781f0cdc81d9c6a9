"""The golden frames of the transfer stream, as bytes and as what they say."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

from vfio_user_virtio.migration.transfer_frames import (
    Abort,
    Ack,
    DeviceFacts,
    End,
    Hello,
    Options,
    Pages,
    Run,
    Stage,
    State,
    Sync,
    ZeroPages,
)
from vfio_user_virtio.protocol.migration import MigrationFlags

if TYPE_CHECKING:
    from vfio_user_virtio.migration.transfer_frames import Frame

FOLDER: Final = Path(__file__).with_name("golden_transfer")
NAMES: Final = sorted(path.stem for path in FOLDER.glob("*.hex"))

TRANSFER: Final = bytes(range(16))
ALL_FLAGS: Final = MigrationFlags.STOP_COPY | MigrationFlags.P2P | MigrationFlags.PRE_COPY

FRAMES: Final[dict[str, Frame]] = {
    "hello": Hello(TRANSFER),
    "hello_one_way": Hello(TRANSFER, Options.ONE_WAY),
    "device": DeviceFacts(ALL_FLAGS, 3, "vm1"),
    "device_unknown": DeviceFacts(MigrationFlags.STOP_COPY, None, ""),
    "state": State(b"\x11\x22\x33"),
    "pages": Pages(0x1_2345_6000, b"\xa5" * 4096),
    "zero_pages": ZeroPages(0x2_0000_0000, 2 << 20),
    "sync": Sync(),
    "end": End(3, 4096, 2 << 20),
    "run": Run(),
    "abort": Abort("no room … here", 78),
    "ack_ready": Ack(Stage.READY, 1),
    "ack_running": Ack(Stage.RUNNING, 7),
}
"""By file; the others are of kinds that nobody knows."""


def golden_frame(name: str) -> bytes:
    lines = (FOLDER / f"{name}.hex").read_text().splitlines()
    return bytes.fromhex("".join(line.partition("#")[0] for line in lines))
