"""``vfio-user-virtio serve``: which devices to serve, and where their clients connect.

Devices come from a file (``--config``) or are one, described by options.  Sockets come from a path
that we make (``--socket-path``), a descriptor that was passed (``--fd``), or the service manager
(neither).  The names ``--socket-path`` and ``--fd`` are those that the vfio-user specification
asks of a server, which also must not fork into the background.
"""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Final

from vfio_user_virtio.backends.software.config import MemberConfig
from vfio_user_virtio.backends.software.owner_function_config import OwnerFunctionConfig
from vfio_user_virtio.errors import HostError
from vfio_user_virtio_server import activation, engine, values
from vfio_user_virtio_server.arguments import argument
from vfio_user_virtio_server.config import (
    NEXT_INHERITED,
    Configuration,
    OwnerConfig,
    ServedMember,
    ServedPf,
    SocketConfig,
    SocketFd,
    SocketPath,
    check,
    control_socket,
    read_file,
)

if TYPE_CHECKING:
    import argparse
    import uuid

    from vfio_user_virtio.backends.vfio.opening import Way
    from vfio_user_virtio.backends.vfio.sysfs import PciAddress
    from vfio_user_virtio_server.config import Configured

_log: Final = logging.getLogger(__name__)

VF_OPTIONS: Final = ("pf", "member", "vf_token", "no_map_bars", "way", "unsafe_noiommu")
"""Options that go with ``--vf`` only."""

DEVICE_OPTIONS: Final = (
    "mac",
    "mtu",
    "queue_pairs",
    "uplink",
    "pcap",
    "max_tx_rate",
    "allow_unsealed_memory",
    "legacy",
    "no_p2p",
    "pf_socket_path",
    "socket_mode",
    "socket_group",
    "control_path",
    "control_mode",
    "control_group",
    *VF_OPTIONS,
    "vf",
)
"""Options that describe the one device; with ``--config`` they belong into the file."""

DEVICE_NAME: Final = "device"
"""What logs call the one device that options describe."""

PF_NAME: Final = "pf"
"""What logs call its owner, where that is served too."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    where = parser.add_argument_group(
        "where clients connect", "without any of these, sockets passed by the service manager"
    )
    sockets = where.add_mutually_exclusive_group()
    sockets.add_argument(
        "--socket-path",
        metavar="PATH",
        type=argument(values.parse_socket_path),
        help="make a socket there; a stale one is replaced",
    )
    sockets.add_argument(
        "--fd",
        metavar="N",
        type=argument(values.parse_fd),
        help="a socket that was passed: one that listens, or a connected one",
    )
    sockets.add_argument("--config", metavar="FILE", help="a TOML file with several devices")
    where.add_argument(
        "--socket-mode",
        metavar="MODE",
        type=argument(values.parse_mode),
        help="permission bits of the socket in octal (default: by umask)",
    )
    where.add_argument(
        "--socket-group",
        metavar="GROUP",
        type=argument(values.parse_name),
        help="group of the socket, for example that of QEMU's user",
    )
    where.add_argument(
        "--one-off", action="store_true", help="end when the first session of each device ends"
    )
    control = parser.add_argument_group(
        "the control interface", "also a passed socket that is called control"
    )
    control.add_argument(
        "--control-path",
        metavar="PATH",
        type=argument(values.parse_socket_path),
        help="make a socket for status, top and moving guests there",
    )
    control.add_argument(
        "--control-mode",
        metavar="MODE",
        type=argument(values.parse_mode),
        help="permission bits of that socket (default: 0600; 0660 with a group)",
    )
    control.add_argument(
        "--control-group",
        metavar="GROUP",
        type=argument(values.parse_name),
        help="group of that socket; its members can read guests' memory",
    )
    engine.add_arguments(where)
    device = parser.add_argument_group("the device, unless --config describes it")
    device.add_argument(
        "--mac",
        metavar="ADDRESS",
        type=argument(values.parse_mac),
        help="MAC address (default: derived from this host and the path of the socket)",
    )
    device.add_argument(
        "--mtu",
        metavar="BYTES",
        type=argument(values.parse_number),
        help="MTU that the guest is told, 68 to 65535",
    )
    device.add_argument(
        "--queue-pairs",
        metavar="N",
        type=argument(values.parse_number),
        help="RX/TX queue pairs, 1 to 8 (default: 1)",
    )
    device.add_argument(
        "--uplink",
        metavar="UPLINK",
        type=argument(values.parse_uplink),
        help=f"{values.UPLINK_FORMS} (default: none)",
    )
    device.add_argument(
        "--pcap",
        metavar="FILE",
        type=argument(values.parse_path),
        help="capture what the guest sends and gets",
    )
    device.add_argument(
        "--max-tx-rate",
        metavar="RATE",
        type=argument(values.parse_rate),
        help="the most that the guest may send, such as 500mbit (default: no limit)",
    )
    device.add_argument(
        "--allow-unsealed-memory",
        action="store_true",
        default=None,
        help="trust the client not to shrink the files that back the guest's memory",
    )
    device.add_argument(
        "--legacy",
        action="store_true",
        default=None,
        help="also serve drivers of before virtio 1.0, by I/O ports (a transitional device)",
    )
    device.add_argument(
        "--no-p2p",
        action="store_true",
        default=None,
        help="offer only the migration states of the vfio-user specification",
    )
    device.add_argument(
        "--pf-socket-path",
        metavar="PATH",
        type=argument(values.parse_socket_path),
        help="serve the device's owner too, a PF with an administration virtqueue, whose client "
        "migrates the device then",
    )

    _add_vf_arguments(parser)


def _add_vf_arguments(parser: argparse.ArgumentParser) -> None:
    physical = parser.add_argument_group("a physical VF instead of the software model")
    physical.add_argument(
        "--vf",
        metavar="PCI",
        type=_address,
        help="the VF, such as 0000:03:00.2, bound to vfio-pci",
    )
    physical.add_argument(
        "--pf",
        metavar="PCI",
        type=_address,
        help="own this PF, for migration (default: the VF's, if vfio-pci holds it)",
    )
    physical.add_argument(
        "--member",
        metavar="N",
        type=_member_id,
        help="the number by which the owner knows the VF (default: as sysfs says)",
    )
    physical.add_argument(
        "--vf-token",
        metavar="UUID",
        type=_token,
        help="VF token of the PF, if another process owns that",
    )
    physical.add_argument(
        "--way",
        metavar="{cdev,group}",
        type=_way,
        help="how to open it (default: the best that the kernel has)",
    )
    physical.add_argument(
        "--no-map-bars",
        action="store_true",
        default=None,
        help="keep the VF's descriptor from the client; each doorbell is a message then",
    )
    physical.add_argument(
        "--unsafe-noiommu",
        action="store_true",
        default=None,
        help="take a device that no IOMMU keeps from all of the host's memory",
    )


def _address(text: str) -> PciAddress:
    from vfio_user_virtio.backends.vfio.sysfs import PciAddress

    return argument(PciAddress.parse)(text)


def _member_id(text: str) -> int:
    from vfio_user_virtio_server.physical_config import parse_member_id

    return argument(parse_member_id)(text)


def _token(text: str) -> uuid.UUID:
    from vfio_user_virtio_server.physical_config import parse_token

    return argument(parse_token)(text)


def _way(text: str) -> Way:
    from vfio_user_virtio_server.physical_config import parse_way

    return argument(parse_way)(text)


def configuration_of(options: argparse.Namespace) -> Configuration:
    """What the options describe.  Raises ConfigError, HostError."""
    if options.config is not None:
        for name in DEVICE_OPTIONS:
            if getattr(options, name) is not None:
                option = "--" + name.replace("_", "-")
                raise _usage(f"{option} does not go with --config; write it into the file")
        return read_file(options.config)
    owners = _owners_of(options)
    control = _control(options)
    check(owners, "options", control)
    return Configuration(owners, control)


def _owners_of(options: argparse.Namespace) -> tuple[Configured, ...]:
    """The owner of the one device."""
    socket = _socket(options)
    if options.vf is not None:
        from vfio_user_virtio_server.physical_config import physical_of_options

        return (physical_of_options(options, DEVICE_NAME, socket),)
    for name in VF_OPTIONS:
        if getattr(options, name) is not None:
            option = "--" + name.replace("_", "-")
            raise _usage(f"{option} is for a physical VF; add --vf")
    arguments = {} if options.queue_pairs is None else {"queue_pairs": options.queue_pairs}
    member = MemberConfig(
        mac=options.mac or _made_mac(socket),
        mtu=options.mtu,
        max_tx_rate=options.max_tx_rate,
        allow_unsealed_memory=bool(options.allow_unsealed_memory),
        **arguments,
    )
    served = ServedMember(
        name=DEVICE_NAME,
        member=member,
        socket=socket,
        pcap=options.pcap,
        legacy=bool(options.legacy),
    )
    owner = OwnerConfig(
        name="owner",
        members=(served,),
        uplink=options.uplink or values.NO_UPLINK,
        p2p=not options.no_p2p,
        pf=_pf(options),
    )
    return (owner,)


def run(options: argparse.Namespace) -> int:
    from vfio_user_virtio_server import daemon

    configuration = configuration_of(options)
    return daemon.run(configuration, one_off=options.one_off, make_session=engine.chosen(options))


def _socket(options: argparse.Namespace) -> SocketConfig:
    if options.socket_path is not None:
        return SocketPath(options.socket_path, options.socket_mode, options.socket_group)
    for name in ("socket_mode", "socket_group"):
        if getattr(options, name) is not None:
            option = "--" + name.replace("_", "-")
            raise _usage(f"{option} is for a socket made here; add --socket-path")
    return NEXT_INHERITED if options.fd is None else SocketFd(options.fd)


def _control(options: argparse.Namespace) -> SocketConfig | None:
    if options.control_path is not None:
        place = SocketPath(options.control_path, options.control_mode, options.control_group)
        return control_socket(place)
    for name in ("control_mode", "control_group"):
        if getattr(options, name) is not None:
            option = "--" + name.replace("_", "-")
            raise _usage(f"{option} is for a socket made here; add --control-path")
    return None


def _pf(options: argparse.Namespace) -> ServedPf | None:
    path = options.pf_socket_path
    if path is None:
        return None
    socket = SocketPath(path, options.socket_mode, options.socket_group)
    function = OwnerFunctionConfig(
        mac=_made_mac(socket), allow_unsealed_memory=bool(options.allow_unsealed_memory)
    )
    return ServedPf(name=PF_NAME, function=function, socket=socket)


def _made_mac(socket: SocketConfig) -> bytes:
    """A MAC address that is always the same for a socket of this host."""
    match socket:
        case SocketPath(path):
            place: str | None = os.path.abspath(path)
        case SocketFd(fd):
            place = activation.path_of(fd)
        case _:
            place = activation.path_of(activation.FIRST_FD)
    if place == "":
        _log.warning(
            "the MAC address is the same for every device of this host whose socket has no path; "
            "give it one with --mac"
        )
    return values.derived_mac(place or "", seed=values.host_seed())


def _usage(message: str) -> HostError:
    return HostError(message, exit_code=os.EX_USAGE)
