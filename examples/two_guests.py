"""Two guests on one switch: two members of one owner, no uplink, no root, no network namespace.

    make setup && .venv/bin/python -m examples.two_guests

One server process has both devices, each guest its own QEMU.  The guests ping each other; the exit
code is 0 only if all echoes were answered and both guests' drivers counted them.  For guests that
do not trust each other use a process per guest and join them outside, with TAP devices in a bridge.
"""

from __future__ import annotations

import re
import shutil
import sys
import tempfile
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Final

import attrs
import trio

from examples.account.lines import Account
from tests.testbed.bed import Bed, TestbedMissing
from tests.testbed.guest import Guest, GuestFailed, boot
from tests.testbed.machine import Machine, vfio_user_pci
from tests.testbed.server_process import ServerFailed, serve

CONFIG: Final = """
[[owner]]
name = "both"
uplink = "none"
"""
MEMBER: Final = """
[[owner.member]]
name = "{name}"
socket_path = "{socket}"
mac = "{mac}"
"""
PINGS: Final = 5
SUMMARY: Final = re.compile(r"(\d+) packets transmitted, (\d+) packets received.*", re.DOTALL)
FAILURES: Final = (GuestFailed, ServerFailed, TestbedMissing, OSError)


@attrs.frozen
class Peer:
    """One of the two guests."""

    name: str
    mac: str
    address: str


LEFT: Final = Peer("left", "52:54:00:00:00:01", "10.0.0.1")
RIGHT: Final = Peer("right", "52:54:00:00:00:02", "10.0.0.2")


async def demonstrate(account: Account, folder: Path) -> None:
    """Boots both and has them ping each other.  Raises one of `FAILURES`."""
    bed = Bed.find()
    config = folder / "two_guests.toml"
    sockets = {peer: folder / f"{peer.name}.sock" for peer in (LEFT, RIGHT)}
    text = CONFIG
    for peer, socket in sockets.items():
        text += MEMBER.format(name=peer.name, socket=socket, mac=peer.mac)
    await trio.Path(config).write_text(text)
    async with serve(folder, "--config", str(config)), AsyncExitStack() as guests:
        account.tell("server", f"serves {LEFT.name} and {RIGHT.name} from one process")
        booted: dict[Peer, Guest] = {}
        for peer, socket in sockets.items():
            machine = Machine(devices=tuple(vfio_user_pci(socket)), programs=("ip",))
            place = folder / peer.name
            guest = await guests.enter_async_context(boot(bed, machine, place))
            await guest.run(f"ip address add {peer.address}/24 dev eth0; ip link set eth0 up")
            account.tell("guest", f"{peer.name} is up with {peer.address}")
            booted[peer] = guest
        for one, other in ((LEFT, RIGHT), (RIGHT, LEFT)):
            await ping(account, booted[one], one, other)
        for peer, guest in booted.items():
            await check_counts(account, guest, peer)


async def ping(account: Account, guest: Guest, one: Peer, other: Peer) -> None:
    """Raises `GuestFailed` unless every echo was answered."""
    output = await guest.run(f"ping -c {PINGS} -i 0.2 -W 5 {other.address}")
    summary = SUMMARY.search(output)
    if not summary or summary.groups() != (str(PINGS), str(PINGS)):
        raise GuestFailed(f"{one.name} → {other.name}: echoes are missing:\n{output}")
    account.tell("guest", f"{one.name} → {other.name}: {' '.join(summary[0].split())}")


async def check_counts(account: Account, guest: Guest, peer: Peer) -> None:
    """Each guest has sent and received its own echoes and the other's."""
    statistics = "cd /sys/class/net/eth0/statistics; cat tx_packets rx_packets"
    sent, received = map(int, (await guest.run(statistics)).split())
    account.tell("guest", f"{peer.name} has sent {sent} packets and received {received}")
    if min(sent, received) < 2 * PINGS:
        raise GuestFailed(f"{peer.name} has counted fewer packets than it has exchanged")


def main() -> int:
    account = Account()
    account.title("Two guests that reach each other by one switch of this project.")
    folder = Path(tempfile.mkdtemp(prefix="vfio-user-virtio-two-"))
    failed: list[str] = []
    try:
        trio.run(demonstrate, account, folder)
    except* FAILURES as failures:
        failed = [str(error) for error in failures.exceptions]
    except* KeyboardInterrupt:
        failed = ["stopped"]
    for reason in failed:
        account.verdict(f"Failed: {reason}\nThe logs are in {folder}", good=False)
    if failed:
        return 1
    shutil.rmtree(folder)
    account.verdict("The guests reach each other.", good=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
