"""Device parts for people and programs: the value of a part as JSON has it, and as a line of text.

What `image show` prints and `image diff` compares, and what a log may say of a part.  A reading is
plain data (`Json`): features and status bits are lists of names, addresses of the network are text
with colons, numbers are numbers, and a part that is not defined is its bytes in hexadecimal.  The
text is made from the reading, not from the part, so both say the same.

Text is kept short: of a long list or a long value the front is shown and the rest is counted.  The
reading is whole.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, TypeAlias

import attrs

from vfio_user_virtio.virtio.common_config import NO_VECTOR, Status
from vfio_user_virtio.virtio.features import feature_names
from vfio_user_virtio.virtio.net_control import ControlClass
from vfio_user_virtio.virtio.net_parts import (
    MAC_SIZE,
    HashConfig,
    MacTable,
    RssConfig,
    decode_value_untrusted,
    mac_addr_part,
)
from vfio_user_virtio.virtio.part_header import PartType

if TYPE_CHECKING:
    from vfio_user_virtio.virtio.common_parts import VqCfg, VqNotifyCfg
    from vfio_user_virtio.virtio.parts import Part

Json: TypeAlias = "bool | int | str | list[Json] | dict[str, Json]"

MAX_SHOWN: Final = 64
"""Entries of a list, and bytes of a value that is not defined, that a text has."""


def reading_untrusted(part: Part) -> Json:
    """The value of `part`.  Raises PartsError if it is malformed."""
    value = decode_value_untrusted(part)
    if isinstance(value, int):
        return _number(part, value)
    if isinstance(value, bytes):
        is_mac = part.name == _MAC_PART
        return value.hex(":") if is_mac else value.hex()
    if isinstance(value, frozenset):
        return [*sorted(value)]
    if isinstance(value, MacTable):
        return {
            "unicast": [address.hex(":") for address in value.unicast],
            "multicast": [address.hex(":") for address in value.multicast],
        }
    return _fields(value)


def _number(part: Part, value: int) -> Json:
    match part.type:
        case PartType.DEV_FEATURES | PartType.DRV_FEATURES:
            return [*feature_names(value)]
        case PartType.DEVICE_STATUS:
            return [*status_names(value)]
        case PartType.CVQ_CFG if part.selector[0] == ControlClass.RX:
            return bool(value)
        case _:
            return value


def _fields(value: VqCfg | VqNotifyCfg | RssConfig | HashConfig) -> Json:
    return {
        name: entry.hex() if isinstance(entry, bytes) else _listed(entry)
        for name, entry in attrs.asdict(value, recurse=False).items()
    }


def _listed(entry: int | tuple[int, ...]) -> Json:
    return [*entry] if isinstance(entry, tuple) else entry


def status_names(status: int) -> list[str]:
    """The names of the bits set in a device_status, lowest first; an unknown bit n is ``BIT_n``."""
    bits = [bit for bit in range(status.bit_length()) if status >> bit & 1]
    return [Status(1 << bit).name or f"BIT_{bit}" for bit in bits]


def text(reading: Json, name: str = "") -> str:
    """A reading in one line; `name` is that of the part or field, and decides how numbers look."""
    if isinstance(reading, bool):
        return "on" if reading else "off"
    if isinstance(reading, int):
        return _number_text(reading, name.rpartition(" ")[2])
    if isinstance(reading, str):
        return _short(reading) or "no value"
    if isinstance(reading, list):
        more = len(reading) - MAX_SHOWN
        shown = [text(entry) for entry in reading[:MAX_SHOWN]]
        return " ".join(shown + [f"… and {more} more"] * (more > 0)) or "none"
    return ", ".join(
        f"{key}{'+' if value else '-'}" if isinstance(value, bool) else f"{key} {text(value, key)}"
        for key, value in reading.items()
    )


def _number_text(number: int, name: str) -> str:
    if name.endswith("msix_vector") and number == NO_VECTOR:
        return "none"
    return hex(number) if name in _IN_HEXADECIMAL else str(number)


def _short(value: str) -> str:
    """`value` unless it is a long one, in hexadecimal: then its front, and how long it is."""
    if len(value) <= 2 * MAX_SHOWN:
        return value
    return f"{value[: 2 * MAX_SHOWN]}… ({len(value) // 2} bytes)"


_MAC_PART: Final = mac_addr_part(bytes(MAC_SIZE)).name
_IN_HEXADECIMAL: Final = frozenset(
    {"desc", "driver", "device", "hash_types", "device_feature", "driver_feature"}
)
"""Addresses and bit masks."""
