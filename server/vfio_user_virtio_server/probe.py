"""``vfio-user-virtio probe``: connect like a VM would, and print the device as lspci(8) would.

Any vfio-user server will do; of a virtio-net device it shows more.  A device serves one client at a
time, so one that a VM uses answers when the VM has gone, which here means: not in time.

``--json`` prints one object whose keys are the attributes of `DeviceFacts`; they are stable.
"""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

import attrs
import trio

from vfio_user_virtio.errors import HostError
from vfio_user_virtio.transport.client import connect_socket
from vfio_user_virtio_server import log, values
from vfio_user_virtio_server.arguments import argument
from vfio_user_virtio_server.device_facts import DeviceFacts, read_device
from vfio_user_virtio_server.dial import dial

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from vfio_user_virtio_server.pci_facts import PciFacts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--socket-path",
        metavar="PATH",
        required=True,
        type=argument(values.parse_socket_path),
        help="the server's socket",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--timeout",
        metavar="SECONDS",
        type=argument(values.parse_seconds),
        default=5.0,
        help="how long the server may take for everything (default: 5)",
    )


def run(options: argparse.Namespace) -> int:
    facts = trio.run(read, options.socket_path, options.timeout)
    if options.json:
        print(json.dumps({"socket": options.socket_path, **attrs.asdict(facts)}, indent=2))
    else:
        print(*(log.escape(line) for line in lines(options.socket_path, facts)), sep="\n")
    return os.EX_OK


async def read(path: str, seconds: float) -> DeviceFacts:
    """What the server at `path` says within `seconds`.  Raises HostError, ConnectionLost."""
    with trio.move_on_after(seconds):
        async with connect_socket(await dial(path)) as client:
            return await read_device(client)
    raise HostError(
        f"{path} does not answer within {seconds:g} s; a device serves one client at a time, so "
        "is a VM using it? --timeout waits longer",
        exit_code=os.EX_UNAVAILABLE,
    )


def lines(path: str, facts: DeviceFacts) -> Iterator[str]:
    """The report for people."""
    pci = facts.pci
    if pci is None:
        yield f"{path}: not a PCI device that can be read"
    else:
        yield (
            f"{path}: {_class_name(pci.class_code)} [{pci.class_code >> 8:04x}]: "
            f"{_device_name(pci)}[{pci.vendor_id:04x}:{pci.device_id:04x}] "
            f"(rev {pci.revision_id:02x})"
        )
        yield f"    Subsystem: {pci.subsystem_vendor_id:04x}:{pci.subsystem_id:04x}"
        yield f"    Control: {_listed(pci.command)}"
        yield f"    Status: {_listed(pci.status)}"
        yield f"    Interrupt: pin {pci.interrupt_pin}"
    for region in facts.regions:
        if region.size:
            kind = "" if pci is None else pci.bar_kinds.get(region.index, "")
            flags = " ".join(region.flags).lower()
            yield (
                f"    Region {region.index}: {region.name}{kind and ' ('}{kind}{kind and ')'} "
                f"[size={_size(region.size)}] {flags}"
            )
            for offset, size in region.areas:
                yield f"        mappable: {offset:#x} [size={_size(size)}]"
    for irq in facts.irqs:
        if irq.count:
            yield f"    IRQ {irq.index}: {irq.name}, count {irq.count} ({_listed(irq.flags)})"
    if pci is not None:
        for capability in pci.capabilities:
            details = ", ".join(_detail(key, value) for key, value in capability.details.items())
            colon = ": " if details else ""
            yield f"    Capabilities: [{capability.offset:02x}] {capability.name}{colon}{details}"
    yield from _virtio_lines(facts)
    granted = ", ".join(_detail(key, value) for key, value in facts.protocol.items())
    yield f"    vfio-user: {granted}; device: {_listed(facts.flags)}"
    for problem in facts.problems:
        yield f"    Problem: {problem}"


def _virtio_lines(facts: DeviceFacts) -> Iterator[str]:
    if facts.net is not None:
        net = facts.net
        speed = "unknown" if net.speed is None else f"{net.speed} Mb/s"
        yield (
            f"    Network: MAC {net.mac or 'none'}, link {_link(net.link_up)}, "
            f"MTU {net.mtu or 'not told'}, speed {speed}, duplex {net.duplex or 'unknown'}, "
            f"queue pairs {net.max_virtqueue_pairs or 1}"
        )
    if facts.virtio is not None:
        virtio = facts.virtio
        yield f"    Features offered: {_listed(virtio.features_offered)}"
        yield f"    Features of the driver: {_listed(virtio.features_driver)}"
        yield f"    Device status: {_listed(virtio.status)}"
        yield f"    Queues: {virtio.num_queues}"
        for queue in virtio.queues:
            state = f"enabled, vector {queue.msix_vector:#x}" if queue.enabled else "not enabled"
            yield f"        {queue.index}: {queue.role}, size {queue.size}, {state}"


def _class_name(code: int) -> str:
    return "Ethernet controller" if code >> 8 == 0x0200 else "Device of class"


def _device_name(pci: PciFacts) -> str:
    names = {0x1041: "virtio network device "}
    return names.get(pci.device_id, "") if pci.vendor_id == 0x1AF4 else ""


def _link(up: bool | None) -> str:
    return "state unknown" if up is None else "up" if up else "down"


def _listed(names: list[str]) -> str:
    return " ".join(names) or "none"


def _detail(key: str, value: object) -> str:
    if isinstance(value, bool):
        return f"{key}{'+' if value else '-'}"
    if isinstance(value, int) and key in {"offset", "length", "table_offset", "pba_offset"}:
        return f"{key} {value:#x}"
    return f"{key} {value}"


def _size(size: int) -> str:
    for shift, unit in ((30, "G"), (20, "M"), (10, "K")):
        if size >> shift and not size & (1 << shift) - 1:
            return f"{size >> shift}{unit}"
    return str(size)
