"""From the address of a PF to an owner that is up, with its VFs, and back (`owned_function`).

The order is what makes it work.  vfio-pci takes no PF that has VFs; opening it resets it; VFs can
be enabled only when its driver, which we are, has set DRIVER_OK, and want the PF's VF token from
whoever opens them.  Going back, VFs go first, and only those that came with us.
"""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING, Final

import trio

from vfio_user_virtio.backends.vfio import binding, discovery, sysfs
from vfio_user_virtio.backends.vfio.opening import OpenOptions, open_pf
from vfio_user_virtio.backends.vfio.owner import OWNER_IOVA, owned
from vfio_user_virtio.backends.vfio.owner_access import KernelAccess
from vfio_user_virtio.errors import HostError
from vfio_user_virtio.virtio.features import Feature

if TYPE_CHECKING:
    import uuid
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from vfio_user_virtio.backends.vfio.opening import OpenedFunction, Way
    from vfio_user_virtio.backends.vfio.owner import VfioOwner
    from vfio_user_virtio.backends.vfio.sysfs import PciAddress

_log: Final = logging.getLogger(__name__)


@contextlib.asynccontextmanager
async def owned_function(
    address: PciAddress,
    *,
    vf_token: uuid.UUID | None = None,
    vfs: int | None = None,
    way: Way | None = None,
    iova: int = OWNER_IOVA,
    allow_untranslated: bool = False,
    root: Path = sysfs.SYS,
) -> AsyncIterator[VfioOwner]:
    """Own the PF at `address`, bound to vfio-pci, for the length of the block.  Raises HostError.

    `vf_token` is what opening its VFs takes from now on, if it has SR-IOV.  `vfs`: have so many
    while it is owned; None: leave their number alone.
    """
    discovery.find_pf(address, root)
    has_vfs = sysfs.sriov(address, root) is not None
    options = OpenOptions(way=way, vf_token=vf_token if has_vfs else None)
    opened = await trio.to_thread.run_sync(lambda: open_pf(address, options, root=root))
    with driven(opened) as access:
        async with (
            owned(access, str(address), iova=iova, allow_untranslated=allow_untranslated) as owner,
            having_vfs(address, vfs, owner, root),
        ):
            yield owner


@contextlib.contextmanager
def driven(opened: OpenedFunction) -> Iterator[KernelAccess]:
    """`opened` as its driver reaches it, for the length of the block; then it is closed, and only
    then is the memory let go of that it could reach."""
    access = KernelAccess(opened)
    try:
        yield access
    finally:
        opened.close()
        access.close()


@contextlib.asynccontextmanager
async def having_vfs(
    address: PciAddress, count: int | None, owner: VfioOwner, root: Path = sysfs.SYS
) -> AsyncIterator[None]:
    """Have `count` VFs of the PF that `owner` drives, for the length of the block; None: as many
    as there are.  Raises HostError."""
    if count is None:
        yield
        return
    if count and not owner.features & Feature.SR_IOV.mask:
        raise HostError(f"{address} does not offer SR_IOV: it can have no VFs")
    plan = binding.vfs(address, count, root)
    await trio.to_thread.run_sync(binding.execute, plan, root)
    present = sysfs.virtual_functions(address, root).values()
    _log.info("%s: VFs: %s", address, ", ".join(map(str, present)) or "none")
    try:
        yield
    finally:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(binding.undo, plan)
