"""Physical VFs in the configuration: `[[physical]]` in a file, ``--vf`` on the command line.

Apart from `config`, because nothing of kernel VFIO is to be imported for the software model.
"""

from __future__ import annotations

import os
import uuid
from typing import TYPE_CHECKING, ClassVar

import attrs

from vfio_user_virtio import limits
from vfio_user_virtio.backends.vfio.opening import Way
from vfio_user_virtio.backends.vfio.physical import PhysicalConfig, VfConfig
from vfio_user_virtio.backends.vfio.sysfs import PciAddress
from vfio_user_virtio.errors import HostError
from vfio_user_virtio.migration.states import EVERYTHING, VFIO_USER
from vfio_user_virtio_server import values
from vfio_user_virtio_server.config import NEXT_INHERITED, SocketConfig, socket_of

if TYPE_CHECKING:
    import argparse

    from vfio_user_virtio_server.table import Table

_WAYS = {"cdev": Way.CDEV, "group": Way.GROUP}

SOFTWARE_OPTIONS = (
    "mac",
    "mtu",
    "queue_pairs",
    "uplink",
    "pcap",
    "max_tx_rate",
    "allow_unsealed_memory",
    "pf_socket_path",
)
"""Options that say what the software model is; a physical VF is what it is."""


@attrs.frozen(kw_only=True)
class ServedVf:
    """A physical VF and how it is served."""

    name: str
    vf: VfConfig
    socket: SocketConfig = NEXT_INHERITED
    kind: ClassVar[str] = "physical"

    @property
    def identity(self) -> str:
        return f"VF {self.vf.address}"


@attrs.frozen(kw_only=True)
class PhysicalOwnerConfig:
    """VFs of one PF, `vfs`, and what is said of all of them, `physical`."""

    name: str
    vfs: tuple[ServedVf, ...]
    physical: PhysicalConfig

    @property
    def served(self) -> tuple[ServedVf, ...]:
        return self.vfs


def parse_way(text: str) -> Way:
    """``cdev`` or ``group``.  Raises ValueError."""
    if text not in _WAYS:
        raise ValueError(f"{text!r} is neither cdev nor group")
    return _WAYS[text]


def parse_token(text: str) -> uuid.UUID:
    """A VF token.  Raises ValueError."""
    try:
        return uuid.UUID(text)
    except ValueError:
        raise ValueError(f"{text!r} is no VF token; it looks like {uuid.UUID(int=1)}") from None


def check_member_id(number: int) -> int:
    """A VF number, from 1.  Raises ValueError."""
    if not 1 <= number <= limits.MAX_MEMBERS:
        raise ValueError(f"{number} is not 1 to {limits.MAX_MEMBERS}")
    return number


def parse_member_id(text: str) -> int:
    """A VF number, from 1.  Raises ValueError."""
    return check_member_id(values.parse_number(text))


def physical_of(table: Table, *, default_name: str) -> PhysicalOwnerConfig:
    """A ``[[physical]]`` table.  Raises ConfigError."""
    name = table.parse("name", values.parse_name) or default_name
    tables = table.tables("vf")
    if not 1 <= len(tables) <= limits.MAX_MEMBERS:
        raise table.error("vf", f"there are 1 to {limits.MAX_MEMBERS} VFs, not {len(tables)}")
    vfs = tuple(_vf(vf, owner_name=name, number=number) for number, vf in enumerate(tables, 1))
    pf = table.parse("pf", PciAddress.parse)
    num_vfs = table.check("num_vfs", check_member_id)
    if num_vfs is not None and pf is None:
        raise table.error("num_vfs", "goes with pf: name the PF that is to have them")
    found = PhysicalOwnerConfig(
        name=name,
        vfs=vfs,
        physical=PhysicalConfig(
            vfs=tuple(served.vf for served in vfs),
            pf=pf,
            vf_token=table.parse("vf_token", parse_token),
            num_vfs=num_vfs,
            states=VFIO_USER if table.take("p2p", bool) is False else EVERYTHING,
            way=table.parse("way", parse_way),
            unsafe_noiommu=table.take("unsafe_noiommu", bool) or False,
        ),
    )
    table.finish()
    return found


def _vf(table: Table, *, owner_name: str, number: int) -> ServedVf:
    address = table.parse("address", PciAddress.parse)
    if address is None:
        raise table.error("address", "is missing; write it as lspci -D does")
    served = ServedVf(
        name=table.parse("name", values.parse_name) or f"{owner_name}-{number}",
        vf=VfConfig(
            address=address,
            member_id=table.check("member", check_member_id),
            map_bars=table.take("map_bars", bool) is not False,
            legacy=table.take("legacy", bool) or False,
        ),
        socket=socket_of(table),
    )
    table.finish()
    return served


def physical_of_options(
    options: argparse.Namespace, name: str, socket: SocketConfig
) -> PhysicalOwnerConfig:
    """The one VF that ``--vf`` names.  Raises HostError for options of the software model."""
    for other in SOFTWARE_OPTIONS:
        if getattr(options, other) is not None:
            option = "--" + other.replace("_", "-")
            raise HostError(
                f"{option} is for the software model, and does not go with --vf",
                exit_code=os.EX_USAGE,
            )
    vf = VfConfig(
        address=options.vf,
        member_id=options.member,
        map_bars=not options.no_map_bars,
        legacy=bool(options.legacy),
    )
    return PhysicalOwnerConfig(
        name="owner",
        vfs=(ServedVf(name=name, vf=vf, socket=socket),),
        physical=PhysicalConfig(
            vfs=(vf,),
            pf=options.pf,
            vf_token=options.vf_token,
            states=VFIO_USER if options.no_p2p else EVERYTHING,
            way=options.way,
            unsafe_noiommu=bool(options.unsafe_noiommu),
        ),
    )
