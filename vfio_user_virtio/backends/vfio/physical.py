"""Physical VFs as devices to be served, with the PF that owns them if it is ours.

What `opened` puts together is in the other modules: the PF is opened first and brought up as an
owner, because opening it resets it, then the VFs with the PF's token.  An owner that knows device
parts gives its VFs migration; one that does not, or that a driver of the kernel has, leaves them as
they are, and the log says what is missing.

The owner may be named; otherwise it is the PF that sysfs names, if vfio-pci holds that.  Whoever
names a VF token and no owner says that another process has it.  A PF that was not named need not be
an owner: one that cannot be, such as one without an administration virtqueue, is held for its
token.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import uuid
from typing import TYPE_CHECKING, Final

import attrs
import trio

from vfio_user_virtio.backends.transitional import transitional
from vfio_user_virtio.backends.vfio import sysfs
from vfio_user_virtio.backends.vfio.binding import VFIO_PCI
from vfio_user_virtio.backends.vfio.function import VfFunction
from vfio_user_virtio.backends.vfio.iommufd import DEV
from vfio_user_virtio.backends.vfio.kernel import KernelRefusal
from vfio_user_virtio.backends.vfio.opening import OpenOptions, open_function, open_pf
from vfio_user_virtio.backends.vfio.owner import owned
from vfio_user_virtio.backends.vfio.owner_opening import driven, having_vfs
from vfio_user_virtio.backends.vfio.owner_transport import NotAnOwner
from vfio_user_virtio.backends.vfio.owner_watch import watched
from vfio_user_virtio.errors import HostError
from vfio_user_virtio.migration.admin_client import AdminClient
from vfio_user_virtio.migration.member_migration import MemberMigration
from vfio_user_virtio.migration.migratable_device import MigratableDevice
from vfio_user_virtio.migration.parts_owner import PartsOwner
from vfio_user_virtio.migration.states import EVERYTHING

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence
    from pathlib import Path

    from vfio_user_virtio.backends.vfio.opening import OpenedFunction, Way
    from vfio_user_virtio.backends.vfio.sysfs import PciAddress
    from vfio_user_virtio.device import Device
    from vfio_user_virtio.migration.states import Options

_log: Final = logging.getLogger(__name__)

_IN_USE: Final = frozenset({errno.EBUSY, errno.EINVAL})
"""By a group, and by a device node."""


@attrs.frozen(kw_only=True)
class VfConfig:
    """One VF.  `member_id`: by which the owner knows it; None: as sysfs says.

    `map_bars`: whether its client may map what can be mapped; a client without that has only the
    socket, and each doorbell is a message.  `legacy`: also a transitional device.
    """

    address: PciAddress
    member_id: int | None = None
    map_bars: bool = True
    legacy: bool = False


@attrs.frozen(kw_only=True)
class PhysicalConfig:
    """VFs of one owner.  `pf`: the PF that we own; None: the VFs' own, if vfio-pci holds it and
    there is no `vf_token`.

    `vf_token`: of the PF that another process owns, or that ours is to have; else it has its own.
    `num_vfs`: have so many VFs of `pf` meanwhile; None: leave their number alone.
    `states`: the migration states on offer.  `way`, `unsafe_noiommu`: see `OpenOptions`.
    `sees_memory`: see `VfFunction`.
    """

    vfs: tuple[VfConfig, ...]
    pf: PciAddress | None = None
    vf_token: uuid.UUID | None = None
    num_vfs: int | None = None
    states: Options = EVERYTHING
    way: Way | None = None
    unsafe_noiommu: bool = False
    sees_memory: bool = False


@attrs.frozen
class Roots:
    """Where sysfs and device nodes are."""

    sys: Path = sysfs.SYS
    dev: Path = DEV


_HERE: Final = Roots()


@contextlib.asynccontextmanager
async def physical_functions(
    config: PhysicalConfig, roots: Roots = _HERE
) -> AsyncIterator[list[Device]]:
    """The devices of `config`, in its order, for the length of the block.

    Raises HostError when one cannot be opened; then none stays open.
    """
    async with contextlib.AsyncExitStack() as stack:
        pf = config.pf
        if pf is None and config.vf_token is None:
            pf = _vfio_owner(config.vfs, roots)
        token = config.vf_token or uuid.uuid4()
        functions: list[VfFunction] = []
        owner = None if pf is None else await _own(stack, functions, pf, token, config, roots)
        if owner is None:
            _log.warning(
                "no owner is ours: devices cannot be migrated; give a PF that has an "
                "administration virtqueue to vfio-pci, vfio-user-virtio bind, and name it with --pf"
            )
        devices: list[Device] = []
        for vf in config.vfs:
            opened = await _open(vf.address, token, config, roots)
            try:
                function = VfFunction(opened, map_bars=vf.map_bars, sees_memory=config.sees_memory)
            except HostError:
                opened.close()
                raise
            stack.callback(function.close)
            functions.append(function)
            devices.append(await _device(function, vf, owner, config.states, roots))
        watchers = await stack.enter_async_context(trio.open_nursery())
        stack.callback(watchers.cancel_scope.cancel)
        for function in functions:
            watchers.start_soon(function.watch)
        yield devices


def _vfio_owner(vfs: Sequence[VfConfig], roots: Roots) -> PciAddress | None:
    """The PF of all `vfs`, if vfio-pci holds it.  Raises HostError for those of several."""
    found = {
        owner for vf in vfs if (owner := sysfs.physical_function(vf.address, roots.sys)) is not None
    }
    if len(found) > 1:
        shown = " and ".join(map(str, sorted(found)))
        raise HostError(f"the VFs have different PFs, {shown}; make a [[physical]] for each")
    ours = [owner for owner in found if sysfs.driver(owner, roots.sys) == VFIO_PCI]
    return ours[0] if ours else None


async def _own(
    stack: contextlib.AsyncExitStack,
    functions: list[VfFunction],
    pf: PciAddress,
    token: uuid.UUID,
    config: PhysicalConfig,
    roots: Roots,
) -> PartsOwner | None:
    """The owner that `pf` is; None if it is none, and nobody has said that it is.

    Then it is one of `functions`, which are watched: its VFs want its token, so it stays open until
    the kernel wants it back.
    """
    try:
        opened = await _open(pf, token, config, roots, open_pf)
    except KernelRefusal as error:
        if error.errno not in _IN_USE:
            raise
        raise HostError(
            f"{error}; or, if it is to own the PF, name the VF token that it has set (--vf-token)",
            exit_code=os.EX_UNAVAILABLE,
        ) from error
    access = stack.enter_context(driven(opened))
    try:
        queue = await stack.enter_async_context(owned(access, str(pf)))
    except NotAnOwner as error:
        if config.pf is not None:
            raise
        _log.warning("%s", error)
        functions.append(VfFunction(opened))
        return None
    await stack.enter_async_context(having_vfs(pf, config.num_vfs, queue, roots.sys))
    parts_owner = PartsOwner(AdminClient(queue))
    support = await parts_owner.discover()
    if support.lack is not None:
        _log.warning("%s: its VFs cannot be migrated: %s", pf, support.lack)
    await stack.enter_async_context(watched(queue, parts_owner, opened.close))
    return parts_owner


async def _open(
    address: PciAddress,
    token: uuid.UUID,
    config: PhysicalConfig,
    roots: Roots,
    open_it: Callable[..., OpenedFunction] = open_function,
) -> OpenedFunction:
    options = OpenOptions(
        way=config.way,
        vf_token=token if _takes_token(address, roots) else None,
        unsafe_noiommu=config.unsafe_noiommu,
    )
    return await trio.to_thread.run_sync(
        lambda: open_it(address, options, root=roots.sys, dev=roots.dev)
    )


def _takes_token(address: PciAddress, roots: Roots) -> bool:
    """Whether the kernel wants a VF token: of a PF with SR-IOV, and of VFs whose PF is on vfio-pci;
    any other function is refused with one."""
    owner = sysfs.physical_function(address, roots.sys)
    if owner is not None:
        return sysfs.driver(owner, roots.sys) == VFIO_PCI
    return sysfs.sriov(address, roots.sys) is not None


async def _device(
    function: VfFunction,
    vf: VfConfig,
    owner: PartsOwner | None,
    states: Options,
    roots: Roots,
) -> Device:
    if owner is None:
        if vf.legacy:
            raise HostError(f"{vf.address}: legacy takes an owner; name its PF with --pf")
        return function
    member_id = vf.member_id or sysfs.group_member_id(vf.address, roots.sys)
    if member_id is None:
        raise HostError(
            f"{vf.address} is not a VF that its PF knows; name the number by which its owner knows "
            "it: --member N"
        )
    device: Device = function
    if owner.support.lack is None:
        migration = MemberMigration(
            owner,
            member_id,
            name=function.name,
            clock=trio.current_time,
            options=states,
            resumed=function.replay,
        )
        device = MigratableDevice(function, migration, function.logging)
    if vf.legacy:
        device = await transitional(device, owner.client, member_id)
    return device
