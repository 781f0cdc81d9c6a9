"""``vfio-user-virtio bind`` and ``unbind``: give PCI functions to vfio-pci, and back.

Several functions are one job: all of it is planned before anything is written, and what fails
undoes what was done for the others before.  ``--dry-run`` shows the writes as shell commands.

Two subcommands in one module: `main.COMMANDS` names it twice, and the parser says which it is for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vfio_user_virtio.backends.vfio import binding, sysfs
from vfio_user_virtio.backends.vfio.sysfs import PciAddress
from vfio_user_virtio.errors import HostError
from vfio_user_virtio_server.arguments import argument

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from vfio_user_virtio.backends.vfio.binding import Plan, Write


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "functions",
        metavar="PCI",
        nargs="+",
        type=argument(PciAddress.parse),
        help="address of a function, such as 0000:03:00.2",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="show what would be written, and write nothing"
    )
    if parser.prog.endswith("unbind"):
        parser.add_argument(
            "--no-driver",
            action="store_true",
            help="leave the functions without a driver (default: the one that the kernel chooses)",
        )
    else:
        parser.add_argument(
            "--driver",
            default=binding.VFIO_PCI,
            metavar="NAME",
            help=f"the driver to give them to (default: {binding.VFIO_PCI})",
        )
        parser.add_argument(
            "--disable-vfs",
            action="store_true",
            help="remove the VFs of a PF that has any, whoever uses them",
        )


def run(options: argparse.Namespace) -> int:
    plans = plans_of(options)
    if options.dry_run:
        for plan in plans:
            for write in plan.writes:
                print(write)
        return 0
    for line in carry_out(plans):
        print(line)
    return 0


def plans_of(options: argparse.Namespace, root: Path = sysfs.SYS) -> list[Plan]:
    """What the options ask for.  Raises HostError."""
    if options.command == "unbind":
        return [
            binding.unbind(address, root, probe=not options.no_driver)
            for address in options.functions
        ]
    return [
        binding.bind(address, root, driver=options.driver, disable_vfs=options.disable_vfs)
        for address in options.functions
    ]


def carry_out(
    plans: Sequence[Plan],
    root: Path = sysfs.SYS,
    write: Callable[[Write], None] | None = None,
) -> list[str]:
    """Do all of it or nothing; a line for each function.  Raises HostError."""
    done: list[Plan] = []
    lines: list[str] = []
    for plan in plans:
        before = sysfs.driver(plan.address, root)
        try:
            binding.execute(plan, root, write)
        except HostError:
            for other in reversed(done):
                binding.undo(other, write)
            raise
        done.append(plan)
        after = sysfs.driver(plan.address, root)
        change = f"{before or 'no driver'} -> {after or 'no driver'}"
        lines.append(f"{plan.address}: {change if before != after else after or 'no driver'}")
    return lines
