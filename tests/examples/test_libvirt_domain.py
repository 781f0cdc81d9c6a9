"""The libvirt domain: well-formed, and QEMU takes what it says about the device.

libvirt itself is not started; its part of the command line is made here from the elements that
matter to the device, the way libvirt makes it.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Final
from xml.etree import ElementTree

import pytest
import trio

from tests.examples.example_process import EXAMPLES
from tests.testbed.server_process import serve

if TYPE_CHECKING:
    from pathlib import Path
    from xml.etree.ElementTree import Element

    from tests.testbed.bed import Bed

DOMAIN: Final = EXAMPLES / "libvirt-domain.xml"
QEMU: Final = "{http://libvirt.org/schemas/domain/qemu/1.0}"
SOCKET: Final = "/run/vfio-user-virtio/vm1.sock"
PROPERTIES: Final = ("type", "realized", "parent_bus")


def attribute(domain: Element, path: str, name: str) -> str:
    element = domain.find(path)
    assert element is not None, path
    return element.attrib[name]


def qemu_arguments(domain: Element) -> list[str]:
    memory = domain.findtext("memory")
    assert attribute(domain, "memory", "unit") == "MiB"
    kind = attribute(domain, "memoryBacking/source", "type")
    share = {"shared": "on", "private": "off"}[attribute(domain, "memoryBacking/access", "mode")]
    machine = attribute(domain, "os/type", "machine")
    return [
        "-machine",
        f"{machine},memory-backend=pc.ram",
        "-object",
        f"memory-backend-{kind},id=pc.ram,size={memory}M,share={share}",
        *(arg.attrib["value"] for arg in domain.iterfind(f"{QEMU}commandline/{QEMU}arg")),
    ]


def test_shares_memory_and_waits_long_enough() -> None:
    words = qemu_arguments(ElementTree.parse(DOMAIN).getroot())
    assert "share=on" in words[3]
    device = json.loads(words[-1])
    assert device["driver"] == "vfio-user-pci"
    assert device["socket"] == {"type": "unix", "path": SOCKET}
    assert device["x-msg-timeout"] > 5000


@pytest.mark.e2e
async def test_qemu_takes_it(bed: Bed, tmp_path: Path) -> None:
    socket = tmp_path / "vm1.sock"
    words = qemu_arguments(ElementTree.parse(DOMAIN).getroot())
    words = [word.replace(SOCKET, str(socket)) for word in words]
    argv = [*bed.qemu(), "-nodefaults", "-display", "none", "-accel", "tcg", "-S"]
    requests: list[dict[str, object]] = [{"execute": "qmp_capabilities"}]
    for name in PROPERTIES:
        arguments = {"path": "/machine/peripheral/vf1", "property": name}
        requests.append({"execute": "qom-get", "arguments": arguments})
    requests.append({"execute": "quit"})
    async with serve(tmp_path, "--socket-path", str(socket)):
        done = await trio.run_process(
            [*argv, "-qmp", "stdio", *words],
            stdin="".join(json.dumps(request) + "\n" for request in requests).encode(),
            capture_stdout=True,
            capture_stderr=True,
        )
    assert done.stderr == b""
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    kind, realized, bus = (answer["return"] for answer in answers[2:5])
    assert kind == "vfio-user-pci"
    assert realized
    assert bus.endswith("/vfio-user-port/vfio-user-port")
