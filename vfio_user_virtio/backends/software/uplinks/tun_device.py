"""The ioctls of /dev/net/tun that a TAP uplink needs, with their errors in words.

Source: linux/if_tun.h and Documentation/networking/tuntap.rst.  `struct ifreq` as used here, 40
bytes: 0 16 interface name, 16 2 flags (native byte order).
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct
from typing import Final

import attrs

from vfio_user_virtio.backends.software.ports import NET_HEADER_SIZE, Offload
from vfio_user_virtio.errors import HostError

TUN_PATH: Final = "/dev/net/tun"

IFF_TAP: Final = 0x0002
IFF_MULTI_QUEUE: Final = 0x0100
IFF_NO_PI: Final = 0x1000
IFF_VNET_HDR: Final = 0x4000
_IFF_UP: Final = 0x1

_TUNSETIFF: Final = 0x4004_54CA
_TUNSETOFFLOAD: Final = 0x4004_54D0
_TUNGETIFF: Final = 0x8004_54D2
_TUNSETVNETHDRSZ: Final = 0x4004_54D8
_TUNSETVNETLE: Final = 0x4004_54DC
_SIOCGIFFLAGS: Final = 0x8913

_IFREQ: Final = struct.Struct("16sH22x")
assert _IFREQ.size == 40
_INT: Final = struct.Struct("i")
_IFNAMSIZ: Final = 16

_TUN_F: Final = {
    Offload.CSUM: 0x01,
    Offload.TSO4: 0x02,
    Offload.TSO6: 0x04,
    Offload.ECN: 0x08,
}
_TUN_F_USO: Final = 0x20 | 0x40
_USO: Final = Offload.USO4 | Offload.USO6

ALL_OFFLOADS: Final = Offload.CSUM | Offload.TSO4 | Offload.TSO6 | Offload.ECN | _USO


@attrs.frozen
class TapDevice:
    """An attached TAP device: a non-blocking descriptor, owned by who has this.

    `vnet_hdr`: frames carry a virtio_net_hdr of 12 bytes.  `offloads`: what the kernel takes
    unfinished; nothing without vnet_hdr.
    """

    fd: int
    name: str
    vnet_hdr: bool
    offloads: Offload

    def set_offloads(self, wanted: Offload) -> None:
        """Have the kernel send frames unfinished in these ways and finish all others.

        What the kernel or `vnet_hdr` does not allow is left out.  Raises OSError if the device is
        gone.
        """
        if not self.vnet_hdr:
            return
        wanted &= self.offloads
        bits = 0
        if wanted & Offload.CSUM:  # all others need it
            bits = sum(bit for offload, bit in _TUN_F.items() if wanted & offload)
            if not wanted & (Offload.TSO4 | Offload.TSO6):
                bits &= ~_TUN_F[Offload.ECN]
            if wanted & _USO == _USO:  # the kernel takes both or none
                bits |= _TUN_F_USO
        fcntl.ioctl(self.fd, _TUNSETOFFLOAD, bits)


def open_tap(name: str) -> TapDevice:
    """Attach to the TAP device `name`, which exists and is up.  Raises HostError."""
    raw_name = name.encode()
    if not 0 < len(raw_name) < _IFNAMSIZ:
        raise HostError(
            f"TAP device name {name!r} has {len(raw_name)} bytes; an interface name has 1 to 15",
            exit_code=os.EX_USAGE,
        )
    _check_is_up(name)
    try:
        fd = os.open(TUN_PATH, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise HostError(open_error(error), exit_code=os.EX_NOPERM) from error
    try:
        _attach(fd, raw_name)
        return tap_from_fd(fd)
    except OSError as error:
        os.close(fd)
        raise HostError(attach_error(name, error), exit_code=os.EX_UNAVAILABLE) from error
    except HostError:
        os.close(fd)
        raise


def tap_from_fd(fd: int) -> TapDevice:
    """Take over a descriptor that is attached to a TAP device.  HostError leaves it alone."""
    try:
        raw_name, flags = _IFREQ.unpack(fcntl.ioctl(fd, _TUNGETIFF, bytes(_IFREQ.size)))
    except OSError as error:
        raise HostError(
            f"fd {fd} is not attached to a TAP device ({error.strerror}); "
            f"open {TUN_PATH} and attach it with TUNSETIFF",
            exit_code=os.EX_USAGE,
        ) from error
    name = raw_name.rstrip(b"\0").decode(errors="replace")
    if not flags & IFF_TAP or not flags & IFF_NO_PI:
        raise HostError(
            f"fd {fd} ({name}) has flags {flags:#x}; it must be a TAP device (IFF_TAP, not "
            "IFF_TUN) without packet information (IFF_NO_PI)",
            exit_code=os.EX_USAGE,
        )
    os.set_blocking(fd, False)
    if not flags & IFF_VNET_HDR:
        return TapDevice(fd, name, False, Offload(0))
    fcntl.ioctl(fd, _TUNSETVNETHDRSZ, _INT.pack(NET_HEADER_SIZE))
    try:
        fcntl.ioctl(fd, _TUNSETVNETLE, _INT.pack(1))
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTTY):  # little-endian hosts need not know it
            raise
    device = TapDevice(fd, name, True, ALL_OFFLOADS)
    try:
        device.set_offloads(ALL_OFFLOADS)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        device = TapDevice(fd, name, True, ALL_OFFLOADS & ~_USO)  # Linux before 6.2
    device.set_offloads(Offload(0))
    return device


def _attach(fd: int, raw_name: bytes) -> None:
    flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR
    try:
        fcntl.ioctl(fd, _TUNSETIFF, _IFREQ.pack(raw_name, flags))
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        # a device that was made with multi_queue wants to hear it again
        fcntl.ioctl(fd, _TUNSETIFF, _IFREQ.pack(raw_name, flags | IFF_MULTI_QUEUE))


def _check_is_up(name: str) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as control:
        try:
            answer = fcntl.ioctl(control, _SIOCGIFFLAGS, _IFREQ.pack(name.encode(), 0))
        except OSError as error:
            raise HostError(
                f"there is no network interface {name} ({error.strerror}); create it with "
                f"'ip tuntap add dev {name} mode tap vnet_hdr user $USER'",
                exit_code=os.EX_UNAVAILABLE,
            ) from error
    if not _IFREQ.unpack(answer)[1] & _IFF_UP:
        raise HostError(
            f"TAP device {name} is down; bring it up with 'ip link set {name} up'",
            exit_code=os.EX_UNAVAILABLE,
        )


def open_error(error: OSError) -> str:
    """Why /dev/net/tun cannot be opened, and what helps."""
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"may not open {TUN_PATH}: give this user read and write access to it"
    return f"cannot open {TUN_PATH}: {error.strerror}; is the kernel module tun loaded?"


def attach_error(name: str, error: OSError) -> str:
    """Why TUNSETIFF failed, and what helps."""
    match error.errno:
        case errno.EPERM:
            return (
                f"may not attach to TAP device {name}: it belongs to another user; recreate it "
                f"with 'ip tuntap add dev {name} mode tap vnet_hdr user $USER', or grant "
                "CAP_NET_ADMIN"
            )
        case errno.EBUSY:
            return (
                f"TAP device {name} is in use by another process; end that one, or take another "
                "device"
            )
        case errno.EINVAL:
            return f"interface {name} is not a TAP device; create one with 'ip tuntap add'"
        case _:
            return f"cannot attach to TAP device {name}: {error.strerror}"
