"""Linux as a judge of the owner: a PF that is served, under the kernel's own driver.

Linux is the only driver of an administration virtqueue that is not ours.  When it has a PF ready
it asks for the commands of the SR-IOV group, says which it will use, and asks for and sets the
device-parts capability, at group 0 and without a list of that group.

That is as far as it goes.  The commands for members come from its driver of VFs, virtio_vfio_pci,
which finds the owner by a VF's place in sysfs (`physfn`), and so needs both to be of one SR-IOV
family.  The functions of several sockets are none, and ours could not make one: a capability in
the PF's configuration space is not passed on to the guest (tried with QEMU 11.1).  What is left to
see, and is tested here, is that this driver takes a member just as vfio-pci would.

What a look at it has told, with the kernel of the test bed (7.3):

* It lists 0x3E7FC: all that is known here but the two commands for resource objects that nothing
  needs, and but LIST_QUERY and LIST_USE, so that it could not list again before a reset.
* Of an answer it takes what it needs: the capability has room for 2 bytes, and gets no padding.
* Without `linux_compat` it takes up the PF as well, without device parts, and says so in its log,
  if by a number: it asks itself for a command that it has not listed.
* It waits for an answer without a limit and holds the device's lock meanwhile, so that no `unbind`
  can come between.  A function-level reset can, past the kernel, by a write to the configuration
  space; whoever bound the driver then waits until the machine is reset.
* A netdev without a link gets no packet from the stack, not even from a packet socket.
"""

from __future__ import annotations

import json
import logging
import re
import socket
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final

import attrs
import pytest
import trio

from tests.backends.owner_function_rig import Pf
from tests.e2e import traffic
from tests.e2e.served import SLOT_1, TAP_MACHINE, boot_on
from tests.testbed.inner_host import boot_inner_host
from tests.testbed.inner_machine import InnerIommu, InnerMachine, Kernel
from tests.testbed.machine import Boot, Iommu, Machine
from tests.testbed.server_process import serve
from vfio_user_virtio.backends.software.admin_queue import DeviceTiming
from vfio_user_virtio.protocol.feature import Feature as VfioFeature
from vfio_user_virtio.testing.loopback import ungrouped_nursery
from vfio_user_virtio.transport.listener import serve_listener
from vfio_user_virtio.virtio.features import Feature, feature_names

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from tests.testbed.bed import Bed
    from tests.testbed.guest import Guest
    from tests.testbed.netns import Netns

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

PF_MAC: Final = "52:54:00:00:00:03"
CONFIG: Final = """
[[owner]]
name = "owner"
uplink = "{uplink}"
[owner.pf]
socket_path = "{folder}/pf.sock"
mac = "{pf_mac}"
{more}
[[owner.member]]
socket_path = "{folder}/vf.sock"
mac = "{mac}"
"""
LISTS: Final = (
    "LIST_QUERY of group 1, member 0: OK (OK); data none, result ffff030000000000",
    "LIST_USE of group 1, member 0: OK (OK); data fce7030000000000, result none",
)
CAPABILITIES: Final = (
    "CAP_ID_LIST_QUERY of group 0, member 0: OK (OK); data none, result 0100000000000000",
    "DEVICE_CAP_GET of group 0, member 0: OK (OK); data 0000000000000000, result ffff",
    "DRIVER_CAP_SET of group 0, member 0: OK (OK); data 0000000000000000ffff, result none",
)
READY: Final = (*LISTS, *CAPABILITIES)
"""All that Linux sends when it has a PF ready."""

DRIVER: Final = "/sys/bus/pci/drivers/virtio-pci"
PF: Final = f"/sys/bus/pci/devices/{SLOT_1}"
NETDEV: Final = "eth0"
"""The PF's; its member is eth1."""

FEATURES: Final = {
    Feature.MAC,
    Feature.STATUS,
    Feature.INDIRECT_DESC,
    Feature.EVENT_IDX,
    Feature.VERSION_1,
    Feature.ACCESS_PLATFORM,
    Feature.ADMIN_VQ,
}
DRIVER_IS_READY: Final = 0xF
"""ACKNOWLEDGE, DRIVER, DRIVER_OK and FEATURES_OK, and neither FAILED nor DEVICE_NEEDS_RESET."""

MACHINES: Final = {
    "plain": TAP_MACHINE,
    "ovmf": attrs.evolve(TAP_MACHINE, boot=Boot.OVMF),
    "seabios": attrs.evolve(TAP_MACHINE, boot=Boot.SEABIOS),
    "messages": attrs.evolve(TAP_MACHINE, shared_memory=False),
    **{
        f"{iommu.name.lower()}-iommu": attrs.evolve(
            TAP_MACHINE, iommu=iommu, append="iommu.passthrough=0 iommu.strict=1"
        )
        for iommu in Iommu
    },
}
REBINDS: Final = 10
SLOW: Final = DeviceTiming(command=0.25)
"""Long enough to come between two commands, short enough for five of them in each boot."""

PCI_EXPRESS: Final = 0x10
DEVICE_CONTROL: Final = 8
FUNCTION_LEVEL_RESET: Final = 0x80
"""In the upper byte of Device Control."""


@attrs.frozen
class Judge:
    """A guest that has the PF in slot 1, and the server's log."""

    guest: Guest
    log: Path

    def commands(self) -> list[str]:
        """The administration commands so far, as the server tells them."""
        said = self.log.read_text()
        return re.findall(r" debug owner-pf: (\w+ of group .*)", said)

    async def complaints(self) -> list[str]:
        """What the kernel has to say of itself, and of the PF, from warnings up."""
        lines = await self.guest.kernel_complaints()
        said = await self.guest.run("dmesg -r | grep '^<[0-4]>' || true")
        about = re.compile(rf"virtio|{SLOT_1}|{NETDEV}")
        return lines + [line for line in said.splitlines() if about.search(line)]


@asynccontextmanager
async def judged(
    bed: Bed,
    folder: Path,
    *,
    machine: Machine = TAP_MACHINE,
    netns: Netns | None = None,
    more: str = "",
) -> AsyncIterator[Judge]:
    """A guest with a PF and its member, which is wired to the test's TAP, if there is one."""
    if netns:
        await traffic.add_tap(netns)
    config = folder / "config.toml"
    config.write_text(
        CONFIG.format(
            folder=folder,
            uplink=f"tap:{traffic.TAP}" if netns else "none",
            pf_mac=PF_MAC,
            mac=traffic.MAC,
            more=more,
        )
    )
    sockets = (folder / "pf.sock", folder / "vf.sock")
    async with (
        serve(
            folder,
            *("--log-level", "debug", "--config", str(config)),
            wrap=netns.wrap if netns else None,
        ) as server,
        boot_on(bed, machine, folder / "guest", *sockets) as guest,
    ):
        if netns:
            await traffic.configure(guest, "eth1")
        yield Judge(guest, server.log)


async def check_bound(guest: Guest, features: set[Feature] = FEATURES) -> None:
    """virtio_net drives the PF, with those features."""
    (device,) = (await guest.run(f"cd {PF} && ls -d virtio*")).split()
    facts = await guest.run(
        f"cd {PF}/{device}; basename $(readlink driver); cat status features; ls net"
    )
    driver, status, bits, netdev = facts.split()
    assert driver == "virtio_net"
    assert int(status, 16) == DRIVER_IS_READY
    word = sum(1 << bit for bit, value in enumerate(bits) if value == "1")
    assert set(feature_names(word)) == {feature.name for feature in features}
    assert netdev == NETDEV


@pytest.mark.parametrize("name", MACHINES)
async def test_linux_takes_the_pf(bed: Bed, tmp_path: Path, name: str) -> None:
    """Behind an IOMMU, after a firmware, and where commands and rings come by messages, too."""
    async with judged(bed, tmp_path, machine=MACHINES[name]) as judge:
        await check_bound(judge.guest)
        assert judge.commands() == list(READY)
        vectors = await judge.guest.run(f"grep $(cd {PF}; ls -d virtio*)-avq /proc/interrupts")
        assert int(vectors.split()[1]) == len(READY), "an interrupt for each command"
        assert await judge.complaints() == []


async def test_linux_takes_a_strict_pf_without_device_parts(bed: Bed, tmp_path: Path) -> None:
    async with judged(bed, tmp_path, more="linux_compat = false") as judge:
        await check_bound(judge.guest)
        (complaint,) = await judge.complaints()
        assert complaint.endswith("virtio_net virtio0: Failed to execute command on admin vq: -95")
        asked, used = judge.commands()
        assert asked.startswith("LIST_QUERY of group 1, member 0: OK")
        assert used.startswith("LIST_USE of group 1, member 0: OK")
        await judge.guest.run(f"ip link set {NETDEV} up")
        await judge.guest.run(f"echo {SLOT_1} >{DRIVER}/unbind && echo {SLOT_1} >{DRIVER}/bind")
        await check_bound(judge.guest)
        assert judge.commands() == [asked, used] * 2


async def test_sr_iov_is_nothing_to_linux_without_the_capability(bed: Bed, tmp_path: Path) -> None:
    """It does not negotiate the feature where configuration space has no SR-IOV."""
    async with judged(bed, tmp_path, more="sr_iov = true") as judge:
        await check_bound(judge.guest)
        assert judge.commands() == list(READY)
        assert await judge.complaints() == []


async def test_the_netdev_of_a_pf_sends_nothing(bed: Bed, netns: Netns, tmp_path: Path) -> None:
    """Whatever a user does to it; and its member's network is none the wiser."""
    async with judged(bed, tmp_path, netns=netns) as judge:
        guest = judge.guest
        with await netns.open_packet_socket(traffic.TAP) as wire:
            await guest.run(f"ip address add 10.1.0.2/24 dev {NETDEV}; ip link set {NETDEV} up")
            assert (await guest.run(f"cat /sys/class/net/{NETDEV}/carrier")).strip() == "0"
            assert PF_MAC in await guest.run(f"ip link show {NETDEV}")
            for odd in (
                "ping -c 1 -W 1 10.1.0.1",
                f"arping -c 1 -w 1 -I {NETDEV} 10.1.0.1",
                f"ethtool {NETDEV}; ethtool -i {NETDEV}; ethtool -S {NETDEV}",
                f"ethtool -K {NETDEV} tso on; ethtool -L {NETDEV} combined 2",
                f"ethtool -g {NETDEV}; ethtool -l {NETDEV}; ethtool -c {NETDEV}",
                f"ip link set {NETDEV} promisc on mtu 9000; ip link set {NETDEV} allmulticast on",
                f"ip link set {NETDEV} down; ip link set {NETDEV} address 02:00:00:00:00:07 up",
                f"echo 1 >/sys/class/net/{NETDEV}/carrier",
                "ping -c 1 -W 1 10.1.0.1",
            ):
                await guest.execute(odd)
            assert await traffic.counter(guest, "tx_dropped", NETDEV) > 0, "something was tried"
            assert await traffic.counter(guest, "tx_packets", NETDEV) == 0
            assert await traffic.counter(guest, "rx_packets", NETDEV) == 0
            await traffic.check_ping(guest, netns)
            ours = {bytes(6), *map(traffic.address, (traffic.MAC, traffic.HOST_MAC))}
            assert {frame[6:12] for frame in received(wire)} <= ours
        assert judge.commands() == list(READY)
        assert await judge.complaints() == []


def received(wire: socket.socket) -> Iterator[bytes]:
    """The frames that a packet socket has."""
    while True:
        try:
            yield wire.recv(1 << 16, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return


async def test_drivers_of_a_pf_come_and_go(bed: Bed, netns: Netns, tmp_path: Path) -> None:
    """Each asks all again; the member is up all the time, as an owner's reset leaves it."""
    async with judged(bed, tmp_path, netns=netns) as judge:
        guest = judge.guest
        for _ in range(REBINDS):
            await guest.run(f"echo {SLOT_1} >{DRIVER}/unbind && ping -c 1 -W 5 {traffic.HOST}")
            await guest.run(f"echo {SLOT_1} >{DRIVER}/bind && ping -c 1 -W 5 {traffic.HOST}")
            await check_bound(guest)
        await traffic.check_tcp(guest, netns)
        assert judge.commands() == [*READY] * (1 + REBINDS)
        assert await judge.complaints() == []


async def test_resets_of_a_pf(bed: Bed, netns: Netns, tmp_path: Path) -> None:
    """By FLR, by D3hot and by the bus above, each without a driver and under one."""
    async with judged(bed, tmp_path, netns=netns) as judge:
        guest, drivers = judge.guest, 1
        methods = (await guest.run(f"cat {PF}/reset_method")).split()
        assert methods == ["flr", "pm", "bus"]
        for method in methods:
            await guest.run(f"echo {method} >{PF}/reset_method")
            for script in (
                f"echo {SLOT_1} >{DRIVER}/unbind; echo 1 >{PF}/reset",
                f"echo 1 >{PF}/reset; echo {SLOT_1} >{DRIVER}/unbind",
            ):
                await guest.run(f"{script}; echo {SLOT_1} >{DRIVER}/bind")
                drivers += 1
                await check_bound(guest)
                await guest.run(f"ping -c 1 -W 5 {traffic.HOST}")
        assert judge.commands() == [*READY] * drivers
        assert await judge.guest.kernel_complaints() == []


async def test_a_guest_with_a_pf_is_reset_as_a_whole(
    bed: Bed, netns: Netns, tmp_path: Path
) -> None:
    """By its own reboot, by the machine's reset button, by the end of QEMU."""
    machine = attrs.evolve(TAP_MACHINE, restartable=True)
    async with judged(bed, tmp_path, machine=machine, netns=netns) as judge:
        guest = judge.guest
        await guest.reboot()
        await check_bound(guest)
        assert judge.commands() == [*READY] * 2
        await guest.qmp.execute("system_reset")
        await guest.wait_boot(3)
        await check_bound(guest)
        assert judge.commands() == [*READY] * 3
        await traffic.configure(guest, "eth1")
        await traffic.check_ping(guest, netns)
        assert await judge.complaints() == []
        await guest.kill()
        sockets = (tmp_path / "pf.sock", tmp_path / "vf.sock")
        async with boot_on(bed, machine, tmp_path / "other", *sockets) as other:
            await check_bound(other)
            assert judge.commands() == [*READY] * 4
            assert await Judge(other, judge.log).complaints() == []


# --- commands that are under way ------------------------------------------------------------------


@attrs.frozen
class SlowPf:
    """A PF that takes its time, served by this process: what of it the log has said."""

    caplog: pytest.LogCaptureFixture

    def count(self, text: str) -> int:
        return sum(text in line for line in self.caplog.messages)

    async def until(self, text: str, count: int) -> None:
        """Until the log has said it so often."""
        with trio.fail_after(60):
            while self.count(text) < count:  # noqa: ASYNC110  a log tells no event
                await trio.sleep(0.02)


@asynccontextmanager
async def slow_pf(path: Path, caplog: pytest.LogCaptureFixture) -> AsyncIterator[SlowPf]:
    caplog.set_level(logging.DEBUG, "vfio_user_virtio.backends")
    function = Pf(timing=SLOW).function
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        async with ungrouped_nursery() as nursery:
            nursery.start_soon(serve_listener, listener, function)
            yield SlowPf(caplog)
            nursery.cancel_scope.cancel()


IS_READY: Final = "pf: the driver is ready"
LAST: Final = "pf: DRIVER_CAP_SET of group 0, member 0: OK"


async def test_unbind_waits_for_commands(
    bed: Bed, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "pf.sock"
    async with slow_pf(path, caplog) as pf, boot_on(bed, TAP_MACHINE, tmp_path, path) as guest:
        await guest.run(f"echo {SLOT_1} >{DRIVER}/unbind")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(guest.run, f"echo {SLOT_1} >{DRIVER}/bind")
            await pf.until(IS_READY, 2)
            await guest.run(f"echo {SLOT_1} >{DRIVER}/unbind")
            assert pf.count(LAST) == 2
        assert (await guest.execute(f"ls {PF}/driver")).code != 0
        await guest.run(f"echo {SLOT_1} >{DRIVER}/bind")
        await check_bound(guest)
        assert await Judge(guest, tmp_path).complaints() == []


async def test_resets_come_between_commands(
    bed: Bed, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """By the machine's reset button, by a function-level reset past Linux, by the end of QEMU."""
    path = tmp_path / "pf.sock"
    machine = attrs.evolve(TAP_MACHINE, restartable=True)
    async with slow_pf(path, caplog) as pf:
        async with boot_on(bed, machine, tmp_path / "first", path) as guest:
            boots = ready = lasts = 1
            for how in ("button", "function", "end"):
                await guest.run(f"echo {SLOT_1} >{DRIVER}/unbind")
                await guest.run(f"echo {SLOT_1} >{DRIVER}/bind &")
                ready += 1
                await pf.until(IS_READY, ready)
                if how == "end":
                    await guest.kill()
                    break
                if how == "function":
                    await write_function_level_reset(guest)
                    await pf.until("reset: the guest wrote Initiate Function Level Reset", 1)
                    await trio.sleep(len(READY) * SLOW.command)
                    assert pf.count(LAST) == lasts, "a reset ends what is under way"
                await guest.qmp.execute("system_reset")
                boots, ready, lasts = boots + 1, ready + 1, lasts + 1
                await guest.wait_boot(boots)
                await check_bound(guest)
                assert pf.count(LAST) == lasts
                assert await Judge(guest, tmp_path).complaints() == []
        async with boot_on(bed, machine, tmp_path / "second", path) as guest:
            await check_bound(guest)
            assert pf.count(LAST) == lasts + 1
    assert not any("broke a rule" in line for line in caplog.messages)


async def write_function_level_reset(guest: Guest) -> None:
    """Into the PF's configuration space, as `setpci` would, which no driver hears of."""
    text = await guest.run(f"hexdump -v -e '/1 \"%02x\"' {PF}/config")
    config = bytes.fromhex(text)
    place = config[0x34]
    while config[place] != PCI_EXPRESS:
        place = config[place + 1]
    place += DEVICE_CONTROL + 1
    script = f"dd of={PF}/config bs=1 count=1 seek={place} conv=notrunc"
    value = config[place] | FUNCTION_LEVEL_RESET
    await guest.run(f"printf '\\{value:03o}' | {script}")


# --- the kernel's driver of VFs -------------------------------------------------------------------


async def test_the_driver_of_vfs_finds_no_owner(bed: Bed, tmp_path: Path) -> None:
    """Members are no VFs to it: it offers what vfio-pci does, and asks the owner for nothing."""
    config = tmp_path / "config.toml"
    text = CONFIG.format(
        folder=tmp_path, uplink="none", pf_mac=PF_MAC, mac=traffic.MAC, more="sr_iov = true"
    )
    config.write_text(f'{text}[[owner.member]]\nsocket_path = "{tmp_path}/vf2.sock"\n')
    sockets = tuple(tmp_path / f"{name}.sock" for name in ("pf", "vf", "vf2"))
    machine = InnerMachine(kernel=Kernel.OWN, iommu=InnerIommu.INTEL, vfs=0, sockets=sockets)
    async with (
        serve(tmp_path, "--log-level", "debug", "--config", str(config)) as server,
        boot_inner_host(bed, machine, tmp_path / "host") as host,
    ):
        judge = Judge(host.guest, server.log)
        _, first, second = machine.function_addresses
        await host.bind(first, "virtio_vfio_pci")
        await host.bind(second, "vfio-pci")
        found = json.loads(await host.python("tests/inner/vfio_features.py", first, second))
        assert VfioFeature.MIGRATION not in found[first]
        assert found[first] == found[second]
        assert judge.commands() == list(READY)
        assert await judge.guest.kernel_complaints() == []
