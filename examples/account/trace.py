"""What QEMU does with the device, in QEMU's own words: its trace events, made readable.

QEMU prints an event per line on standard error.  The formats are those of QEMU 11.1.3; a line that
does not fit is left out, since the account is to be read and the log is kept.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from vfio_user_virtio.device import VfioIrq, VfioRegion

if TYPE_CHECKING:
    from examples.account.lines import Account

EVENTS: Final = (
    "vfio_user_version",
    "vfio_user_dma_map",
    "vfio_user_dma_unmap",
    "vfio_user_get_region_info",
    "vfio_user_get_irq_info",
    "vfio_device_reset_handler",
    "vfio_msix_enable",
)
ARGUMENTS: Final = tuple(word for event in EVENTS for word in ("-trace", event))
"""QEMU's options that switch these events on."""

NUMBER: Final = re.compile(r"(\w+) (0x[0-9a-f]+|\d+)\b")
READ_WRITE: Final = 3


def size_text(size: int) -> str:
    for shift, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if size >= 1 << shift and not size % (1 << shift):
            return f"{size >> shift} {unit}"
    return f"{size} bytes"


class Trace:
    """Tells the events of one QEMU, a line at a time."""

    def __init__(self, account: Account) -> None:
        self._account = account
        self._asked = False
        self._resets = 0
        self._maps = 0
        self._unmaps = 0

    def take(self, line: str) -> None:
        event, _, rest = line.partition(" ")
        values = {name: int(value, 0) for name, value in NUMBER.findall(rest)}
        match event:
            case "vfio_user_version":  # what QEMU proposes, then what the server replied
                if self._asked:
                    self._tell(f"takes vfio-user {values['major']}.{values['minor']}")
                self._asked = True
            case "vfio_user_dma_map":
                self._map(values)
            case "vfio_user_dma_unmap":
                self._unmaps += 1
            case "vfio_user_get_region_info" if values["size"]:
                self._tell(f"finds {region_name(values['index'])}, {size_text(values['size'])}")
            case "vfio_user_get_irq_info" if values["index"] == VfioIrq.MSIX:
                self._tell(f"finds MSI-X with {values['count']} vectors")
            case "vfio_device_reset_handler":
                if not self._resets:
                    self._tell("resets the device and starts the guest")
                self._resets += 1
            case "vfio_msix_enable":
                self._tell(
                    "re-mapped guest memory while its firmware ran: "
                    f"{self._maps} more maps, {self._unmaps} unmaps"
                )
                self._tell("the guest's driver switches MSI-X on")
            case _:
                pass

    def _map(self, values: dict[str, int]) -> None:
        if self._resets:
            self._maps += 1
            return
        access = "read and write" if values["flags"] == READ_WRITE else "read only"
        self._tell(f"DMA_MAP {size_text(values['size'])} at {values['iova']:#x}, {access}")

    def _tell(self, what: str) -> None:
        self._account.tell("qemu", what)


def region_name(index: int) -> str:
    if index == VfioRegion.CONFIG:
        return "the configuration space"
    return VfioRegion(index).name
