"""``vfio-user-virtio check``: what this host has and lacks for serving physical VFs.

One line for each thing that matters, and below each that is missing the command that mends it.
Nothing is changed, and no device is opened, so it may be run at any time, by any user; it answers
for that user.  The software model needs nothing of all this.

``--json`` prints one object: ``facts`` is a list of what is printed otherwise.  The exit code is
EX_UNAVAILABLE if anything is missing that there is no way around.
"""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Final

from vfio_user_virtio.backends.vfio.sysfs import PciAddress
from vfio_user_virtio_server import log
from vfio_user_virtio_server.arguments import argument
from vfio_user_virtio_server.function_facts import function_facts, functions
from vfio_user_virtio_server.host_facts import Fact, Roots, Verdict, host_facts

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator, Sequence

DEFAULT_QEMU: Final = "qemu-system-x86_64"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "functions",
        metavar="PCI",
        nargs="*",
        type=argument(PciAddress.parse),
        help="VFs or PFs, such as 0000:03:00.2 (default: all of virtio-net with SR-IOV)",
    )
    parser.add_argument(
        "--qemu",
        metavar="PATH",
        default=DEFAULT_QEMU,
        help=f"the QEMU that guests will run in (default: {DEFAULT_QEMU})",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> int:
    facts = find(options.functions, Roots(), options.qemu)
    if options.json:
        shown = [{**_fields(fact), "verdict": fact.verdict.name} for fact in facts]
        print(json.dumps({"facts": shown}, indent=2))
    else:
        print(*(log.escape(line) for line in lines(facts)), sep="\n")
    bad = any(fact.verdict is Verdict.BAD for fact in facts)
    return os.EX_UNAVAILABLE if bad else os.EX_OK


def find(wanted: Sequence[PciAddress], roots: Roots, qemu: str) -> list[Fact]:
    """All facts.  Raises HostError if a wanted function is not there."""
    facts = list(host_facts(roots, qemu))
    chosen = list(wanted) or functions(roots)
    for address in chosen:
        facts += function_facts(address, roots)
    if not chosen:
        facts.append(
            Fact(
                "virtio-net functions with SR-IOV",
                Verdict.BAD,
                "none",
                "serve without --vf takes the software model",
            )
        )
    return facts


def lines(facts: Sequence[Fact]) -> Iterator[str]:
    """The table for people."""
    width = max(len(fact.what) for fact in facts)
    for fact in facts:
        yield f"{fact.verdict.value:8}{fact.what:{width + 2}}{fact.found}"
        if fact.remedy and fact.verdict is not Verdict.GOOD:
            yield f"{'':8}{'':{width + 2}}-> {fact.remedy}"


def _fields(fact: Fact) -> dict[str, str]:
    return {"what": fact.what, "found": fact.found, "remedy": fact.remedy}
