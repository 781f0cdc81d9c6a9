"""What a PCI configuration space says, decoded as lspci(8) would, from bytes that may be anything.

For `probe`: the bytes come from a server that need not be ours, so capability chains may loop, lie
about their length or lead out of the space.  What makes no sense is left out or shown as it is;
nothing here raises on any input.

Sources: PCI Local Bus 3.0, 6.1 and 6.7; PCI Express Base 4.0, 7.5 and 7.7; virtio 1.4, Virtio
Structure PCI Capabilities.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, TypeAlias

import attrs

from vfio_user_virtio.virtio.pci_capabilities import CfgType

if TYPE_CHECKING:
    from collections.abc import Callable

HEADER_SIZE: Final = 64
EXTENDED_START: Final = 0x100

Details: TypeAlias = "dict[str, int | str | bool]"

_COMMAND: Final = {
    0: "IO",
    1: "MEMORY",
    2: "MASTER",
    6: "PARITY",
    8: "SERR",
    10: "INTX_DISABLE",
}
_STATUS: Final = {3: "INTERRUPT", 4: "CAPABILITIES_LIST"}

_PCIE_TYPES: Final = {
    0: "Endpoint",
    1: "Legacy Endpoint",
    4: "Root Port",
    5: "Upstream Port",
    6: "Downstream Port",
    9: "Root Complex Integrated Endpoint",
    10: "Root Complex Event Collector",
}
_LINK_SPEEDS: Final = {1: "2.5 GT/s", 2: "5 GT/s", 3: "8 GT/s", 4: "16 GT/s", 5: "32 GT/s"}
_POWER_STATES: Final = ("D0", "D1", "D2", "D3hot")
_EXTENDED_NAMES: Final = {
    0x01: "Advanced Error Reporting",
    0x03: "Device Serial Number",
    0x0B: "Vendor-Specific",
    0x0D: "Access Control Services",
    0x0E: "Alternative Routing-ID Interpretation",
    0x0F: "Address Translation Services",
    0x10: "Single Root I/O Virtualization",
    0x1B: "Process Address Space ID",
}


@attrs.frozen
class CapabilityFacts:
    """One capability; `extended` ones have IDs of their own.  `details` differ by kind."""

    offset: int
    id: int
    extended: bool
    name: str
    details: Details


@attrs.frozen
class PciFacts:
    """The header and the capabilities; `class_code` has 24 bits, base class highest."""

    vendor_id: int
    device_id: int
    revision_id: int
    class_code: int
    subsystem_vendor_id: int
    subsystem_id: int
    command: list[str]
    status: list[str]
    interrupt_pin: str
    bar_kinds: dict[int, str]
    capabilities: list[CapabilityFacts]


@attrs.frozen
class Place:
    """A virtio structure: `length` bytes at `offset` of BAR `bar`."""

    bar: int
    offset: int
    length: int


def decode_config_untrusted(config: bytes) -> PciFacts | None:
    """The facts in a configuration space, or None if it is shorter than a header."""
    if len(config) < HEADER_SIZE:
        return None
    pin = config[0x3D]
    status = _u16(config, 0x06)
    capabilities = _capabilities(config) if status & 1 << 4 else []
    return PciFacts(
        vendor_id=_u16(config, 0x00),
        device_id=_u16(config, 0x02),
        revision_id=config[0x08],
        class_code=_u32(config, 0x08) >> 8,
        subsystem_vendor_id=_u16(config, 0x2C),
        subsystem_id=_u16(config, 0x2E),
        command=_names(_u16(config, 0x04), _COMMAND),
        status=_names(status, _STATUS),
        interrupt_pin="none" if not pin else f"INT{'?ABCD'[pin] if pin <= 4 else '?'}",
        bar_kinds=_bar_kinds(config),
        capabilities=[*capabilities, *_extended_capabilities(config)],
    )


def virtio_places(facts: PciFacts) -> dict[str, Place]:
    """Where the virtio structures are, by name of their cfg_type; the first of a kind counts."""
    places: dict[str, Place] = {}
    for capability in facts.capabilities:
        details = capability.details
        if capability.name == "virtio" and int(details["bar"]) <= 5:
            place = Place(int(details["bar"]), int(details["offset"]), int(details["length"]))
            places.setdefault(str(details["cfg_type"]), place)
    return places


# --- capabilities -----------------------------------------------------------------------------


def _capabilities(config: bytes) -> list[CapabilityFacts]:
    found: list[CapabilityFacts] = []
    seen: set[int] = set()
    offset = config[0x34] & ~3
    while HEADER_SIZE <= offset <= min(len(config), EXTENDED_START) - 4 and offset not in seen:
        seen.add(offset)
        number = config[offset]
        name, size, decode = _DECODERS.get(number, (f"capability {number:#04x}", 0, _nothing))
        body = config[offset:EXTENDED_START]
        details = decode(body) if len(body) >= size else None
        if details is None:
            name, details = f"{name}, not understood", {}
        found.append(CapabilityFacts(offset, number, False, name, details))
        offset = config[offset + 1] & ~3
    return found


def _extended_capabilities(config: bytes) -> list[CapabilityFacts]:
    found: list[CapabilityFacts] = []
    seen: set[int] = set()
    offset = EXTENDED_START
    while EXTENDED_START <= offset <= len(config) - 4 and offset not in seen:
        seen.add(offset)
        header = _u32(config, offset)
        if header in (0, 0xFFFF_FFFF):
            break
        number = header & 0xFFFF
        name = _EXTENDED_NAMES.get(number, f"extended capability {number:#06x}")
        found.append(CapabilityFacts(offset, number, True, name, {"version": header >> 16 & 0xF}))
        offset = header >> 20 & ~3
    return found


def _nothing(_: bytes) -> Details:
    return {}


def _power_management(body: bytes) -> Details:
    pmc, pmcsr = _u16(body, 2), _u16(body, 4)
    return {
        "version": pmc & 7,
        "state": _POWER_STATES[pmcsr & 3],
        "no_soft_reset": bool(pmcsr & 1 << 3),
    }


def _msi(body: bytes) -> Details:
    control = _u16(body, 2)
    return {"enabled": bool(control & 1), "vectors": 1 << (control >> 1 & 7)}


def _pcie(body: bytes) -> Details:
    capabilities, device, link = _u16(body, 2), _u32(body, 4), _u32(body, 0x0C)
    kind = capabilities >> 4 & 0xF
    speed = link & 0xF
    return {
        "version": capabilities & 0xF,
        "type": _PCIE_TYPES.get(kind, f"type {kind}"),
        "flr": bool(device & 1 << 28),
        "max_payload": 128 << (device & 7),
        "link_speed": _LINK_SPEEDS.get(speed, f"speed {speed}"),
        "link_width": link >> 4 & 0x3F,
    }


def _msix(body: bytes) -> Details:
    control, table, pba = _u16(body, 2), _u32(body, 4), _u32(body, 8)
    return {
        "enabled": bool(control & 1 << 15),
        "masked": bool(control & 1 << 14),
        "vectors": (control & 0x7FF) + 1,
        "table_bar": table & 7,
        "table_offset": table & ~7,
        "pba_bar": pba & 7,
        "pba_offset": pba & ~7,
    }


def _virtio(body: bytes) -> Details | None:
    """A virtio structure's capability, or None for some other vendor's."""
    length, cfg_type = body[2], body[3]
    if length < 16 or cfg_type not in _CFG_TYPES:
        return None
    details: Details = {
        "cfg_type": CfgType(cfg_type).name,
        "bar": body[4],
        "offset": _u32(body, 8),
        "length": _u32(body, 12),
    }
    if cfg_type == CfgType.NOTIFY and min(length, len(body)) >= 20:
        details["notify_off_multiplier"] = _u32(body, 16)
    return details


_CFG_TYPES: Final = frozenset(CfgType) - {CfgType.VENDOR}
_DECODERS: Final[dict[int, tuple[str, int, Callable[[bytes], Details | None]]]] = {
    0x01: ("Power Management", 8, _power_management),
    0x05: ("MSI", 4, _msi),
    0x09: ("virtio", 16, _virtio),
    0x10: ("PCI Express", 20, _pcie),
    0x11: ("MSI-X", 12, _msix),
}
"""By ID: what to call it, the bytes that are looked at, and how."""

# --- registers --------------------------------------------------------------------------------


def _bar_kinds(config: bytes) -> dict[int, str]:
    kinds: dict[int, str] = {}
    index = 0
    while index < 6:
        flags = _u32(config, 0x10 + 4 * index)
        if flags & 1:
            kinds[index] = "I/O"
        else:
            bits = 64 if flags & 6 == 4 else 32
            prefetchable = "prefetchable" if flags & 8 else "non-prefetchable"
            kinds[index] = f"memory, {bits}-bit, {prefetchable}"
            index += bits == 64
        index += 1
    return kinds


def _names(value: int, names: dict[int, str]) -> list[str]:
    return [name for bit, name in names.items() if value >> bit & 1]


def _u16(data: bytes, offset: int) -> int:
    return int.from_bytes(data[offset : offset + 2], "little")


def _u32(data: bytes, offset: int) -> int:
    return int.from_bytes(data[offset : offset + 4], "little")
