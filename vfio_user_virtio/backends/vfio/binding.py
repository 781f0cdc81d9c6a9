"""Giving PCI functions to vfio-pci and back: plans of writes to sysfs.

A plan is made from what sysfs says now, and is plain data: it can be shown (``--dry-run``), carried
out, and undone, in the reverse order, by what stood there before.  The way is that of
``driver_override``: it names a driver for one function, where the older ``new_id`` names it for all
functions with the same IDs.

A PF needs two things more.  vfio-pci refuses one whose VFs are enabled, and lets VFs be enabled
only with its parameter ``enable_sriov``.  VFs of a PF on vfio-pci are bound to vfio-pci by the
kernel as they appear.

Sources: Linux, Documentation/ABI/testing/sysfs-bus-pci; drivers/vfio/pci/vfio_pci.c.
"""

from __future__ import annotations

import contextlib
import errno
import os
from typing import TYPE_CHECKING, Final

import attrs

from vfio_user_virtio.backends.vfio import sysfs
from vfio_user_virtio.errors import HostError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from vfio_user_virtio.backends.vfio.sysfs import PciAddress

VFIO_PCI: Final = "vfio-pci"
ENABLE_SRIOV: Final = "module/vfio_pci/parameters/enable_sriov"


@attrs.frozen
class Write:
    """Write `value` and a newline to `path`."""

    path: Path
    value: str

    def __str__(self) -> str:
        return f"echo {self.value} > {self.path}" if self.value else f"echo > {self.path}"


@attrs.frozen
class Plan:
    """`writes` in their order, after which the function has `driver` (None: none, or whichever the
    kernel chooses), and `undo`, which puts back what was there when the plan was made."""

    address: PciAddress
    writes: tuple[Write, ...] = ()
    undo: tuple[Write, ...] = ()
    driver: str | None = None


def bind(
    address: PciAddress,
    root: Path = sysfs.SYS,
    *,
    driver: str = VFIO_PCI,
    disable_vfs: bool = False,
) -> Plan:
    """Give a function to `driver`.  No writes if it is there already.

    `disable_vfs`: if it is a PF with VFs, remove those first, whoever uses them.  Raises HostError
    if that is needed and not allowed, or if the driver is not loaded.
    """
    before: list[Write] = []
    after: list[Write] = []
    if driver == VFIO_PCI and sysfs.sriov(address, root) is not None:
        before, after = _enable_sriov(root)
    if sysfs.driver(address, root) == driver:
        return Plan(address, tuple(before), tuple(after), driver)
    if not (root / "bus/pci/drivers" / driver).is_dir():
        raise HostError(
            f"there is no driver {driver}; load it: modprobe {driver}",
            exit_code=os.EX_UNAVAILABLE,
        )
    vfs = _without_vfs(address, root, allowed=disable_vfs)
    override = sysfs.driver_override(address, root) or ""
    had_driver = sysfs.driver(address, root) is not None
    return Plan(
        address,
        (*before, *vfs[0], *_change(address, root, driver, probe=True)),
        (*_change(address, root, override, probe=had_driver, bound=True), *vfs[1], *after),
        driver,
    )


def unbind(address: PciAddress, root: Path = sysfs.SYS, *, probe: bool = True) -> Plan:
    """Take a function from its VFIO driver and let the kernel choose, or with no `probe` leave it
    without a driver.  No writes if no VFIO driver and no override of one is there."""
    present = sysfs.driver(address, root)
    override = sysfs.driver_override(address, root)
    if not is_vfio(present) and not is_vfio(override):
        return Plan(address, driver=present)
    undo: tuple[Write, ...] = ()
    if present is not None:
        undo = _change(address, root, override or present, probe=True, bound=True)
    return Plan(address, _change(address, root, "", probe=probe), undo)


def vfs(address: PciAddress, count: int, root: Path = sysfs.SYS) -> Plan:
    """Have `count` VFs of a PF, which no driver of the kernel takes by itself.

    No writes if there are so many already; a PF cannot go from some to others without having none
    between.  Raises HostError if the PF cannot have so many.
    """
    path = sysfs.device_path(address, root)
    present = sysfs.sriov(address, root)
    if present is None:
        raise HostError(f"{address} has no SR-IOV capability; it is no PF")
    if not 0 <= count <= present.total_vfs:
        raise HostError(f"{address} can have 0 to {present.total_vfs} VFs, not {count}")
    if count == present.num_vfs:
        return Plan(address, driver=sysfs.driver(address, root))
    autoprobe = path / "sriov_drivers_autoprobe"
    number = path / "sriov_numvfs"
    writes = [Write(number, "0")] if present.num_vfs else []
    undo = [Write(number, "0")] if count else []
    if count:
        writes += [Write(autoprobe, "0"), Write(number, str(count))]
    if present.drivers_autoprobe:
        undo.append(Write(autoprobe, "1"))
    if present.num_vfs:
        undo.append(Write(number, str(present.num_vfs)))
    return Plan(address, tuple(writes), tuple(undo), sysfs.driver(address, root))


def is_vfio(driver: str | None) -> bool:
    """Whether a driver of that name gives its functions to user space."""
    return driver is not None and (driver == VFIO_PCI or "vfio" in driver)


def execute(
    plan: Plan, root: Path = sysfs.SYS, write: Callable[[Write], None] | None = None
) -> None:
    """Carry a plan out, by `write` if not by writing to files.

    Raises HostError, having undone it as far as that goes, if a write is refused or the function
    has not the driver that it should have.
    """
    try:
        for each in plan.writes:
            (write or perform)(each)
        _check(plan, root)
    except HostError:
        undo(plan, write)
        raise


def undo(plan: Plan, write: Callable[[Write], None] | None = None) -> None:
    """Take a plan back, whatever part of it was carried out; what cannot be is left."""
    for each in plan.undo:
        with contextlib.suppress(HostError):
            (write or perform)(each)


def perform(write: Write) -> None:
    """Do one write.  Raises HostError."""
    try:
        with open(write.path, "w") as file:
            file.write(write.value + "\n")
    except OSError as error:
        remedy = _REMEDIES.get(error.errno or 0, "the kernel log may have the reason: dmesg")
        denied = error.errno in (errno.EACCES, errno.EPERM)
        raise HostError(
            f"{write}: {error.strerror}; {remedy}",
            exit_code=os.EX_NOPERM if denied else os.EX_OSERR,
        ) from None


def _check(plan: Plan, root: Path) -> None:
    bound = sysfs.driver(plan.address, root)
    if plan.driver is not None and bound != plan.driver:
        shown = "no driver" if bound is None else f"driver {bound}"
        raise HostError(
            f"{plan.address} has {shown} instead of {plan.driver}; "
            "the kernel log has the reason: dmesg"
        )


def _change(
    address: PciAddress, root: Path, override: str, *, probe: bool, bound: bool = False
) -> tuple[Write, ...]:
    """From whichever driver is bound (`bound`: will be, by then) to the one `override` names."""
    path = sysfs.device_path(address, root)
    writes = [Write(path / "driver_override", override)]
    if bound or sysfs.driver(address, root) is not None:
        writes.append(Write(path / "driver/unbind", str(address)))
    if probe:
        writes.append(Write(root / "bus/pci/drivers_probe", str(address)))
    return tuple(writes)


def _without_vfs(
    address: PciAddress, root: Path, *, allowed: bool
) -> tuple[tuple[Write, ...], tuple[Write, ...]]:
    """What removes the VFs of a PF, and what brings them back."""
    present = sysfs.sriov(address, root)
    if present is None or not present.num_vfs:
        return (), ()
    path = sysfs.device_path(address, root) / "sriov_numvfs"
    if not allowed:
        raise HostError(
            f"{address} has {present.num_vfs} VFs, and its driver cannot be changed while it has; "
            f"when nobody uses them: echo 0 > {path}, or bind --disable-vfs"
        )
    return (Write(path, "0"),), (Write(path, str(present.num_vfs)),)


def _enable_sriov(root: Path) -> tuple[list[Write], list[Write]]:
    """What lets VFs of a PF on vfio-pci be enabled, and what forbids it again."""
    path = root / ENABLE_SRIOV
    try:
        enabled = path.read_text().strip() in ("Y", "1")
    except FileNotFoundError:  # a kernel without SR-IOV, or without the module
        return [], []
    return ([], []) if enabled else ([Write(path, "Y")], [Write(path, "N")])


_REMEDIES: Final = {
    errno.EACCES: "do it as root",
    errno.EPERM: "do it as root",
    errno.EROFS: "sysfs is read-only here; do it outside of this container",
    errno.EBUSY: "somebody uses the function, or its PF is not ready",
    errno.ENOENT: "the driver of the PF enables no VFs; vfio-pci wants enable_sriov=Y",
}
