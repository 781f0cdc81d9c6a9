"""What to serve: owners with their uplinks, and the members that clients may connect to.

Plain data, made from a TOML file (`read_file`) or from command line options (serve.py), checked as
a whole here (`check`), and turned into live objects by daemon.py.  The keys of the file are the
attributes of these classes and of `MemberConfig`, which also has the ranges:

    [control]                        # the control interface, if there is to be one
    socket_path = "/run/control"     # or fd = 3, or fd_name = "control", its default
    socket_mode = "0600"             # its default
    socket_group = "adm"

    [[owner]]                        # one switch; 1 … 255 members
    name = "blue"                    # default: owner1, owner2, …
    uplink = "tap:vnet0"             # default: "none"; the forms are those of --uplink
    pcap = "/var/tmp/blue.pcap"      # capture of the uplink
    p2p = true                       # migration states ..._P2P, beside the specification's

    [owner.pf]                       # serve the owner too: its client, not we, migrates members
    name = "pf"                      # default: OWNER-pf
    socket_path = "/run/pf.sock"     # or as a member's
    mac = "52:54:00:12:34:55"        # default: derived likewise
    sr_iov = false                   # offer the feature SR_IOV
    linux_compat = true              # be what Linux's driver expects; false: the standard's text
    allow_unsealed_memory = false

    [[owner.member]]                 # one device; its member id is its place, from 1
    name = "vm1"                     # default: OWNER-1, OWNER-2, …
    socket_path = "/run/vm1.sock"    # or fd = 3, or fd_name = "vm1", or none of them:
    socket_mode = "0660"             # sockets passed by the service manager are then
    socket_group = "kvm"             # taken in their order
    mac = "52:54:00:12:34:56"        # default: derived from this host, the file and the names
    mtu = 9000
    queue_pairs = 4
    queue_size = 256
    speed = 10000                    # Mbit/s, what the guest is shown
    max_tx_rate = "500mbit"
    access_vlan = 10
    allow_unsealed_memory = false
    legacy = false                   # also a transitional device, for drivers before virtio 1.0
    pcap = "/var/tmp/vm1.pcap"       # capture of the member
    features = { HOST_USO = false }  # by the standard's names

    [[physical]]                     # physical VFs of one PF
    name = "red"                     # default: physical1, physical2, …
    pf = "0000:03:00.0"              # own it; default: the VFs' PF, if vfio-pci holds it
    num_vfs = 4                      # have so many VFs of `pf`; default: as many as there are
    vf_token = "0b0b…"               # of the PF, if another process owns it
    way = "cdev"                     # or "group"; default: the best that the kernel has
    p2p = true
    unsafe_noiommu = false

    [[physical.vf]]
    address = "0000:03:00.2"
    member = 2                       # its number at the owner; default: as sysfs says
    map_bars = true                  # let clients map what they can
    legacy = false
    socket_path = "/run/vm2.sock"    # or as a member's

Paths are relative to the working directory, as they are on the command line.
"""

from __future__ import annotations

import os
import tomllib
from typing import TYPE_CHECKING, ClassVar, Final, TypeAlias

import attrs

from vfio_user_virtio import limits
from vfio_user_virtio.backends.software.config import (
    DEFAULT_FEATURES,
    OPTIONAL_FEATURES,
    MemberConfig,
)
from vfio_user_virtio.backends.software.owner_function_config import OwnerFunctionConfig
from vfio_user_virtio.errors import ConfigError, HostError
from vfio_user_virtio.virtio.features import Feature, feature_names
from vfio_user_virtio_server import values
from vfio_user_virtio_server.table import Table

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from vfio_user_virtio_server.physical_config import PhysicalOwnerConfig, ServedVf


@attrs.frozen
class SocketPath:
    """A socket that we make at `path`, with permission bits `mode` (None: by umask) and `group`."""

    path: str
    mode: int | None = None
    group: str | None = None


@attrs.frozen
class SocketFd:
    """A socket that was passed as descriptor `fd`, listening or connected."""

    fd: int


@attrs.frozen
class InheritedSocket:
    """A socket from the service manager: the one called `fd_name`, or the next when None."""

    fd_name: str | None = None


NEXT_INHERITED: Final = InheritedSocket()

CONTROL_NAME: Final = "control"
"""The passed socket that is the control interface's, unless the configuration says otherwise."""

CONTROL_MODE: Final = 0o600
"""Who may connect there may read guests' memory, so it is not left to the umask."""

SocketConfig: TypeAlias = SocketPath | SocketFd | InheritedSocket


@attrs.frozen(kw_only=True)
class ServedMember:
    """A member and how it is served: `name` is for logs, `pcap` the path of a capture, `legacy`
    whether drivers of before virtio 1.0 find a device too."""

    name: str
    member: MemberConfig
    socket: SocketConfig = NEXT_INHERITED
    pcap: str | None = None
    legacy: bool = False

    kind: ClassVar[str] = "software"

    @property
    def mac(self) -> bytes:
        return self.member.mac

    @property
    def identity(self) -> str:
        return f"MAC address {values.format_mac(self.mac)}"


@attrs.frozen(kw_only=True)
class ServedPf:
    """An owner as a PCI function of its own, and how it is served."""

    name: str
    function: OwnerFunctionConfig
    socket: SocketConfig = NEXT_INHERITED

    kind: ClassVar[str] = "owner"

    @property
    def mac(self) -> bytes:
        return self.function.mac

    @property
    def identity(self) -> str:
        return f"MAC address {values.format_mac(self.mac)}"


Served: TypeAlias = "ServedMember | ServedPf | ServedVf"


@attrs.frozen(kw_only=True)
class OwnerConfig:
    """An owner with the uplink of its switch and 1 … 255 members; `pcap` captures the uplink.

    `p2p`: whether members have the migration states …_P2P, beside the vfio-user specification's.
    `pf`: the owner is served as well; members then migrate by its commands, not by their sockets.
    """

    name: str
    members: tuple[ServedMember, ...]
    uplink: values.UplinkConfig = values.NO_UPLINK
    pcap: str | None = None
    p2p: bool = True
    pf: ServedPf | None = None

    @property
    def served(self) -> tuple[Served, ...]:
        """All that is served, in the order in which sockets are taken."""
        return self.members if self.pf is None else (*self.members, self.pf)


Configured: TypeAlias = "OwnerConfig | PhysicalOwnerConfig"


@attrs.frozen
class Configuration:
    """All that is to be served: `owners`, and the control interface at `control`, if any."""

    owners: tuple[Configured, ...]
    control: SocketConfig | None = None


CONFIGURABLE_FEATURES: Final = (DEFAULT_FEATURES | OPTIONAL_FEATURES) & ~(
    Feature.VERSION_1.mask | Feature.ACCESS_PLATFORM.mask
)
"""What `features` may name: all but those that guests, or guests behind an IOMMU, depend on.

MTU and MQ are not among them; they come with `mtu` and `queue_pairs`.
"""


def read_file(path: str, *, seed: bytes | None = None) -> Configuration:
    """What the TOML file at `path` describes: owners in its order, physical ones last.

    `seed` is for `values.derived_mac`; None means this host's.  Raises ConfigError when the
    content is wrong, HostError when it cannot be read.
    """
    try:
        with open(path, "rb") as file:
            document = tomllib.load(file)
    except OSError as error:
        code = os.EX_NOPERM if isinstance(error, PermissionError) else os.EX_NOINPUT
        raise HostError(
            f"cannot read the configuration {path}: {error.strerror}; "
            "check --config and who may read the file",
            exit_code=code,
        ) from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: byte {error.start} is not UTF-8, which TOML is") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not TOML: {error}") from None
    except RecursionError:
        raise ConfigError(f"{path}: nested too deeply; owners and their members are two") from None
    control = parse_control(document, path)
    owners = parse_document(document, path, seed=values.host_seed() if seed is None else seed)
    check(owners, path, control)
    return Configuration(owners, control)


def parse_control(document: dict[str, object], where: str) -> SocketConfig | None:
    """Where the control interface is, by a parsed TOML document.  Raises ConfigError."""
    table = Table(document, where).table("control")
    if "control" not in document:
        return None
    socket = socket_of(table)
    table.finish()
    return control_socket(socket)


def control_socket(socket: SocketConfig) -> SocketConfig:
    """`socket`, with the defaults of a control interface."""
    match socket:
        case SocketPath(path, None, group):
            return SocketPath(path, CONTROL_MODE if group is None else 0o660, group)
        case InheritedSocket(None):
            return InheritedSocket(CONTROL_NAME)
    return socket


def parse_document(
    document: dict[str, object], where: str, *, seed: bytes
) -> tuple[Configured, ...]:
    """The owners in a parsed TOML document.  `where` is its path.  Raises ConfigError."""
    root = Table(document, where)
    owners: tuple[Configured, ...] = tuple(
        _owner(table, default_name=f"owner{number}", file=os.path.abspath(where), seed=seed)
        for number, table in enumerate(root.tables("owner"), 1)
    )
    if physical := root.tables("physical"):
        from vfio_user_virtio_server.physical_config import physical_of

        owners += tuple(
            physical_of(table, default_name=f"physical{number}")
            for number, table in enumerate(physical, 1)
        )
    root.table("control")
    root.finish()
    if not owners:
        raise ConfigError(
            f"{where}: no [[owner]]; add one with at least one [[owner.member]], "
            "or [[physical]] with a [[physical.vf]]"
        )
    check(owners, where)
    return owners


def _owner(table: Table, *, default_name: str, file: str, seed: bytes) -> OwnerConfig:
    name = table.parse("name", values.parse_name) or default_name
    tables = table.tables("member")
    if not 1 <= len(tables) <= limits.MAX_MEMBERS:
        raise table.error(
            "member", f"an owner has 1 to {limits.MAX_MEMBERS} members, not {len(tables)}"
        )
    owner = OwnerConfig(
        name=name,
        uplink=table.parse("uplink", values.parse_uplink) or values.NO_UPLINK,
        pcap=table.parse("pcap", values.parse_path),
        p2p=table.take("p2p", bool) is not False,
        pf=_pf(table.table("pf"), owner_name=name, file=file, seed=seed),
        members=tuple(
            _member(member, member_id=number, owner_name=name, file=file, seed=seed)
            for number, member in enumerate(tables, 1)
        ),
    )
    table.finish()
    return owner


def _member(
    table: Table, *, member_id: int, owner_name: str, file: str, seed: bytes
) -> ServedMember:
    name = table.parse("name", values.parse_name) or f"{owner_name}-{member_id}"
    features_on, features_off = _features(table.table("features"))
    try:
        member = MemberConfig(
            member_id=member_id,
            mac=table.parse("mac", values.parse_mac)
            or values.derived_mac(file, owner_name, name, seed=seed),
            mtu=table.take("mtu", int),
            max_tx_rate=table.parse("max_tx_rate", values.parse_rate),
            access_vlan=table.take("access_vlan", int),
            features_on=features_on,
            features_off=features_off,
            allow_unsealed_memory=table.take("allow_unsealed_memory", bool) or False,
            **_given(
                queue_pairs=table.take("queue_pairs", int),
                queue_size=table.take("queue_size", int),
                speed=table.take("speed", int),
            ),
        )
    except ConfigError as error:
        if str(error).startswith(table.where):
            raise
        raise ConfigError(f"{table.where}: {error}") from None
    served = ServedMember(
        name=name,
        member=member,
        socket=socket_of(table),
        pcap=table.parse("pcap", values.parse_path),
        legacy=table.take("legacy", bool) or False,
    )
    table.finish()
    return served


def _pf(table: Table, *, owner_name: str, file: str, seed: bytes) -> ServedPf | None:
    if not table.keys():
        return None
    name = table.parse("name", values.parse_name) or f"{owner_name}-pf"
    pf = ServedPf(
        name=name,
        function=OwnerFunctionConfig(
            mac=table.parse("mac", values.parse_mac)
            or values.derived_mac(file, owner_name, name, seed=seed),
            sr_iov=table.take("sr_iov", bool) or False,
            linux_compat=table.take("linux_compat", bool) is not False,
            allow_unsealed_memory=table.take("allow_unsealed_memory", bool) or False,
        ),
        socket=socket_of(table),
    )
    table.finish()
    return pf


def socket_of(table: Table) -> SocketConfig:
    """Where the clients of the device in `table` connect.  Raises ConfigError."""
    path = table.parse("socket_path", values.parse_socket_path)
    mode = table.parse("socket_mode", values.parse_mode)
    group = table.parse("socket_group", values.parse_name)
    fd = table.check("fd", values.check_fd)
    fd_name = table.parse("fd_name", values.parse_name)
    if sum(choice is not None for choice in (path, fd, fd_name)) > 1:
        raise table.error("socket_path", "only one of socket_path, fd and fd_name can be given")
    if path is not None:
        return SocketPath(path, mode, group)
    if mode is not None or group is not None:
        raise table.error(
            "socket_path", "is missing; socket_mode and socket_group are for a socket made here"
        )
    return SocketFd(fd) if fd is not None else InheritedSocket(fd_name)


def _features(table: Table) -> tuple[int, int]:
    """Feature words to switch on and off, from a table of names and booleans."""
    words = {True: 0, False: 0}
    configurable = feature_names(CONFIGURABLE_FEATURES)
    for name in table.keys():  # noqa: SIM118 - a method of ours, not of a dict
        if name not in configurable:
            raise table.unknown("feature", name, configurable)
        if (switch := table.take(name, bool)) is not None:
            words[switch] |= Feature[name].mask
    return words[True], words[False]


def _given(**arguments: int | None) -> dict[str, int]:
    """Only the arguments that have a value, so that the others keep their defaults."""
    return {name: value for name, value in arguments.items() if value is not None}


def check(owners: Sequence[Configured], where: str, control: SocketConfig | None = None) -> None:
    """What must differ does.  Raises ConfigError naming both places.

    MAC addresses must differ in the whole file, since nothing says that two uplinks do not lead to
    the same network.
    """
    for owner in owners:
        if not isinstance(owner, OwnerConfig):
            continue
        if owner.pf is not None and any(served.legacy for served in owner.members):
            raise ConfigError(
                f"{where}: owner {owner.name} serves its PF, whose client then has the legacy "
                "commands; take legacy off its members, or do not serve the PF"
            )
    seen: dict[tuple[str, object], str] = {}
    unique = [*_unique_values(owners), *_unique_of_socket(control, "the control interface")]
    for kind, value, place in unique:
        shown = values.format_mac(value) if isinstance(value, bytes) else value
        if other := seen.get((kind, value)):
            raise ConfigError(f"{where}: {kind} {shown} is used by {other} and by {place}")
        seen[kind, value] = place


def _unique_values(owners: Sequence[Configured]) -> Iterator[tuple[str, str | int | bytes, str]]:
    """What only one may have: its kind, the value, and who has it."""
    for owner in owners:
        place = f"owner {owner.name}"
        yield "owner name", owner.name, place
        if isinstance(owner, OwnerConfig):
            yield from _unique_of_switch(owner, place)
        for served in owner.served:
            yield from _unique_of_served(served, owner.name)


def _unique_of_switch(
    owner: OwnerConfig, place: str
) -> Iterator[tuple[str, str | int | bytes, str]]:
    match owner.uplink:
        case values.TapUplink(name):
            yield "TAP device", name, place
        case values.TapFdUplink(fd):
            yield "descriptor", fd, place
        case values.DatagramUplink(path, _) | values.StreamListenUplink(path):
            yield "path", os.path.abspath(path), place
    if owner.pcap is not None:
        yield "path", os.path.abspath(owner.pcap), place


def _unique_of_served(
    served: Served, owner_name: str
) -> Iterator[tuple[str, str | int | bytes, str]]:
    match served:
        case ServedMember():
            place = f"member {served.name} of owner {owner_name}"
            own: tuple[str, bytes | str] = "MAC address", served.mac
        case ServedPf():
            place = f"PF {served.name} of owner {owner_name}"
            own = "MAC address", served.mac
        case _:
            place = f"VF {served.name} of owner {owner_name}"
            own = "PCI address", str(served.vf.address)
    yield "member name", served.name, place
    yield *own, place
    yield from _unique_of_socket(served.socket, place)
    if isinstance(served, ServedMember) and served.pcap is not None:
        yield "path", os.path.abspath(served.pcap), place


def _unique_of_socket(
    socket: SocketConfig | None, place: str
) -> Iterator[tuple[str, str | int | bytes, str]]:
    match socket:
        case SocketPath(path, _, _):
            yield "path", os.path.abspath(path), place
        case SocketFd(fd):
            yield "descriptor", fd, place
        case InheritedSocket(fd_name) if fd_name is not None:
            yield "passed socket", fd_name, place
