"""Values of the parts that every virtio device on PCI has (virtio 1.4, Device parts).

Little-endian, with exactly these lengths, as the standard demands of a receiver:

- DEV_FEATURES, DRV_FEATURES: array of u64, feature n at bit n % 64 of word n / 64.  How many words
  is up to the device, and both ends must agree on it
- PCI_COMMON_CFG: one register, at its natural size; its offset is the selector
- DEVICE_STATUS: u8
- VQ_CFG: ``0`` u16 queue_size, ``2`` u16 vector, ``4`` u16 enabled (0 or 1), ``6`` 2 reserved,
  ``8`` u64 desc, ``16`` u64 driver, ``24`` u64 device; addresses are IOVAs
- VQ_NOTIFY_CFG: ``0`` u16 queue_notify_off, ``2`` u16 queue_notif_config_data, ``4`` 4 reserved

What is in none of them, and so must be found again elsewhere: the position in a ring, the device's
own configuration, ISR, MSI-X and PCI configuration, a notification that is pending.
"""

from __future__ import annotations

import struct
from typing import Final

import attrs

from vfio_user_virtio import limits
from vfio_user_virtio.virtio.part_header import (
    COMMON_REGISTERS,
    OPTIONAL,
    PartType,
    queue_selector,
    register_selector,
)
from vfio_user_virtio.virtio.parts import Part

_VQ_CFG: Final = struct.Struct("<HHH2xQQQ")
VQ_CFG_SIZE: Final = 32
assert _VQ_CFG.size == VQ_CFG_SIZE
_VQ_NOTIFY_CFG: Final = struct.Struct("<HH4x")
VQ_NOTIFY_CFG_SIZE: Final = 8
assert _VQ_NOTIFY_CFG.size == VQ_NOTIFY_CFG_SIZE

FEATURE_WORDS: Final = 2
"""u64 words of features that we write: 128 bits, as many as the registers reach."""


@attrs.frozen
class VqCfg:
    """The value of VQ_CFG; addresses are IOVAs in bytes, `size` in descriptors."""

    size: int
    msix_vector: int
    enabled: bool
    desc: int
    driver: int
    device: int


@attrs.frozen
class VqNotifyCfg:
    """The value of VQ_NOTIFY_CFG."""

    queue_notify_off: int
    queue_notif_config_data: int


def dev_features_part(features: int, words: int = FEATURE_WORDS) -> Part:
    """What the device offers; marked OPTIONAL, as the standard has it."""
    value = features.to_bytes(8 * words, "little")
    return Part(PartType.DEV_FEATURES, value, flags=OPTIONAL)


def drv_features_part(features: int, words: int = FEATURE_WORDS) -> Part:
    """What the driver accepted."""
    return Part(PartType.DRV_FEATURES, features.to_bytes(8 * words, "little"))


def decode_features_untrusted(part: Part) -> int:
    """The feature word of a DEV_FEATURES or DRV_FEATURES part.  Raises PartsError."""
    size = len(part.value)
    if not size or size % 8:
        raise part.refuse(f"its value has {size} bytes, which are not words of 8")
    if size > 8 * limits.MAX_FEATURE_WORDS:
        raise part.refuse(
            f"it has {size // 8} words of features; the limit is {limits.MAX_FEATURE_WORDS}"
        )
    return int.from_bytes(part.value, "little")


def common_cfg_part(offset: int, value: int) -> Part:
    """The register at `offset`, which is in `COMMON_REGISTERS`."""
    raw = value.to_bytes(COMMON_REGISTERS[offset].size, "little")
    return Part(PartType.PCI_COMMON_CFG, raw, register_selector(offset))


def decode_common_cfg_untrusted(part: Part) -> int:
    """The value of the register that the selector names.  Raises PartsError."""
    register = COMMON_REGISTERS.get(part.header.register)
    if register is None:
        raise part.refuse("no register starts there")
    part.require_size(register.size)
    return int.from_bytes(part.value, "little")


def device_status_part(status: int) -> Part:
    return Part(PartType.DEVICE_STATUS, bytes((status,)))


def decode_device_status_untrusted(part: Part) -> int:
    """Raises PartsError."""
    part.require_size(1)
    return part.value[0]


def vq_cfg_part(index: int, cfg: VqCfg) -> Part:
    value = _VQ_CFG.pack(cfg.size, cfg.msix_vector, cfg.enabled, cfg.desc, cfg.driver, cfg.device)
    return Part(PartType.VQ_CFG, value, queue_selector(index))


def decode_vq_cfg_untrusted(part: Part) -> VqCfg:
    """Raises PartsError."""
    part.require_size(VQ_CFG_SIZE)
    size, msix_vector, enabled, desc, driver, device = _VQ_CFG.unpack(part.value)
    if enabled > 1:
        raise part.refuse(f"enabled is {enabled}, not 0 or 1")
    return VqCfg(size, msix_vector, bool(enabled), desc, driver, device)


def vq_notify_cfg_part(index: int, cfg: VqNotifyCfg) -> Part:
    value = _VQ_NOTIFY_CFG.pack(cfg.queue_notify_off, cfg.queue_notif_config_data)
    return Part(PartType.VQ_NOTIFY_CFG, value, queue_selector(index))


def decode_vq_notify_cfg_untrusted(part: Part) -> VqNotifyCfg:
    """Raises PartsError."""
    part.require_size(VQ_NOTIFY_CFG_SIZE)
    return VqNotifyCfg(*_VQ_NOTIFY_CFG.unpack(part.value))
