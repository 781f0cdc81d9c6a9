"""Any process that takes part in a move dies at any step: `ENDS` is what stands then.

Each cell kills one for real, with real QEMUs and servers, and looks at all that is left: what the
command says, and when it does; in which state each QEMU is; that servers hold nothing and can be
used again; that the guest has its network, or runs nowhere.  A row is the beginning of a step, or
a point within one (`killing.WITHIN`).
"""

from __future__ import annotations

import contextlib
import enum
from os import EX_CONFIG, EX_IOERR, EX_OSERR
from signal import SIGKILL
from typing import TYPE_CHECKING, Final

import attrs
import pytest
import trio

from tests.e2e import traffic
from tests.e2e.killed import LINUX, Said, arguments, open_sides, run
from tests.e2e.killing import WITHIN
from tests.testbed.qmp import QmpError
from vfio_user_virtio.errors import HostError
from vfio_user_virtio_server.vm import standing
from vfio_user_virtio_server.vm.move import STEPS

if TYPE_CHECKING:
    from pathlib import Path

    from tests.e2e.killed import Machinery, Side
    from tests.testbed.bed import Bed
    from tests.testbed.netns import Netns


class Victim(enum.Enum):
    SOURCE_QEMU = "source QEMU"
    SOURCE_SERVER = "source server"
    TARGET_QEMU = "target QEMU"
    TARGET_SERVER = "target server"
    COMMAND = "migrate-vm"


class End(enum.Enum):
    """What stands, apart from the victim."""

    SAME = "the source runs as before, the target waits"
    BACK = "the source runs on, the target has ended"
    LOST = "the guest was in the victim, or in its hands; the target has ended"
    DEAF = "the source has lost its device, and may have aborted; the target has ended"
    THERE = "the guest runs at the target, the source has ended"
    STOP = "the source is stopped, as the guest has run at the target"
    BARE = "the guest runs at the target without its device, which may have aborted"
    HELD = "the source runs, or waits stopped; the target waits: --take-back leads BACK"
    TWIN = "the guest runs at the target, the source is stopped: --take-back refuses"


SAME, BACK, LOST, DEAF, THERE, STOP, BARE, HELD, TWIN = End

ENDS: Final = {
    #                          source           target
    #                          QEMU    server   QEMU   server  migrate-vm
    "check":                   (SAME,   SAME,    SAME,  SAME,   HELD),
    "look":                    (SAME,   SAME,    BACK,  SAME,   HELD),
    "listen":                  (LOST,   DEAF,    BACK,  BACK,   HELD),
    "compare functions":       (LOST,   DEAF,    BACK,  BACK,   HELD),
    "prepare devices":         (LOST,   DEAF,    BACK,  BACK,   HELD),
    "pre-copy":                (LOST,   DEAF,    BACK,  BACK,   HELD),
    "pre-copy, under way":     (LOST,   DEAF,    BACK,  BACK,   HELD),
    "stop devices":            (LOST,   DEAF,    BACK,  BACK,   HELD),
    "save devices":            (LOST,   DEAF,    BACK,  BACK,   HELD),
    "save devices, under way": (LOST,   DEAF,    BACK,  BACK,   HELD),
    "mark pages":              (LOST,   THERE,   BACK,  BACK,   HELD),
    "switch over":             (LOST,   THERE,   BACK,  BACK,   HELD),
    "switch over, under way":  (LOST,   THERE,   BACK,  BACK,   HELD),
    "restore PCI state":       (THERE,  THERE,   BACK,  BACK,   HELD),
    "resume devices":          (THERE,  THERE,   BACK,  BACK,   HELD),
    "run":                     (THERE,  THERE,   BACK,  BARE,   HELD),
    "run, told":               (THERE,  THERE,   STOP,  BARE,   TWIN),
}  # fmt: skip

SAID: Final = {
    SAME: standing.UNTOUCHED,
    BACK: standing.BACK,
    LOST: standing.LOST,
    DEAF: standing.DEAF,
    STOP: "stays stopped, as the guest has run at the target",
}
"""What the command says at its end; of a guest that has arrived, nothing."""


def test_the_table_is_whole() -> None:
    assert set(ENDS) == {step.name for step in STEPS} | set(WITHIN)


ABORTS: Final = {
    (Victim.SOURCE_SERVER, DEAF): {LOST},
    (Victim.SOURCE_SERVER, THERE): {LOST},
    (Victim.TARGET_SERVER, BARE): {BACK, STOP},
}
"""What it is instead if QEMU aborts at once as its server dies, which it may (11.1.3)."""

IN_TIME: Final = {
    ("save devices, under way", Victim.SOURCE_SERVER): {THERE},
    ("switch over, under way", Victim.SOURCE_QEMU): {THERE},
}
"""What it is instead if the victim had done its part before the signal came."""


def rows(victim: Victim, *ends: End) -> list[tuple[str, End]]:
    column = list(Victim).index(victim)
    return [(row, cells[column]) for row, cells in ENDS.items() if cells[column] in ends]


async def kill(row: str, victim: Victim, source: Side, target: Side) -> Said:
    """Run the command, in which `victim` dies."""
    print(row, "x", victim.value)
    processes = {
        Victim.SOURCE_QEMU: source.qemu.process.pid,
        Victim.SOURCE_SERVER: source.server.process.pid,
        Victim.TARGET_QEMU: target.qemu.process.pid,
        Victim.TARGET_SERVER: target.server.process.pid,
        Victim.COMMAND: 0,
    }
    words = (row, str(processes[victim]), *arguments(source, target))
    said = await run("tests.e2e.killing", *words)
    print(said)
    return said


def outcome(said: Said, row: str, victim: Victim, end: End) -> End:
    """`end`, or what is as good, by what the command said; its message names the step."""
    allowed: set[End] = {end, *ABORTS.get((victim, end), ()), *IN_TIME.get((row, victim), ())}
    if said == Said(0, ""):
        arrived = allowed & {THERE, BARE}
        assert arrived
        return arrived.pop()
    steps = [step.name for step in STEPS]
    named = said.text.removeprefix("vfio-user-virtio: ").partition(":")[0]
    assert steps.index(named) >= steps.index(row.partition(",")[0])
    assert said.code in (EX_OSERR, EX_IOERR)
    assert said.text.count("\n") == 1
    (found,) = [one for one, text in SAID.items() if text in said.text]
    assert found in allowed
    return found


async def check(end: End, victim: Victim, source: Side, target: Side) -> None:
    """Every process is as `end` says, and servers hold nothing."""
    here = {SAME: "running", BACK: "running", DEAF: "running", STOP: "postmigrate"}.get(end)
    there = {SAME: "inmigrate", THERE: "running", BARE: "running"}.get(end)
    for side, status, qemu, server in (
        (source, here, Victim.SOURCE_QEMU, Victim.SOURCE_SERVER),
        (target, there, Victim.TARGET_QEMU, Victim.TARGET_SERVER),
    ):
        if status is None or victim is qemu:
            await side.qemu.process.wait()
        elif victim is server:
            await check_without_server(side.qemu, status)
        else:
            assert await side.qemu.status() == status
        if victim is not server:
            await side.server.wait_free(connected=status is not None and victim is not qemu)


async def check_without_server(qemu: Machinery, status: str) -> None:
    """It is in `status`, or has aborted; then it is ended."""
    with contextlib.suppress(*GONE):
        assert await qemu.status() == status
    await discard(qemu)


GONE: Final = (HostError, QmpError, trio.BrokenResourceError)
"""What a monitor's two clients raise when its QEMU has ended."""


async def discard(qemu: Machinery) -> None:
    with contextlib.suppress(*GONE):
        await qemu.monitor.execute("quit")
    await qemu.process.wait()


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.parametrize(
    ("victim", "ends"),
    [
        (Victim.SOURCE_QEMU, (SAME, LOST)),
        (Victim.SOURCE_SERVER, (SAME, DEAF)),
        (Victim.TARGET_SERVER, (BARE,)),
    ],
)
async def test_the_guest_is_harmed(
    victim: Victim, ends: tuple[End, ...], bed: Bed, tmp_path: Path
) -> None:
    """It is firmware: nothing can be asked of it afterwards."""
    async with open_sides(bed, tmp_path) as sides:
        source, target = await sides.make(1, incoming=False), await sides.make(2, incoming=True)
        for row, end in rows(victim, *ends):
            said = await kill(row, victim, source, target)
            found = outcome(said, row, victim, end)
            await check(found, victim, source, target)
            await discard(source.qemu)
            if found is not SAME:
                await discard(target.qemu)
            if victim is Victim.SOURCE_SERVER:
                await sides.renew_server(source, incoming=False)
            else:
                await sides.renew_qemu(source, incoming=False)
            if victim is Victim.TARGET_SERVER:
                await sides.renew_server(target, incoming=True)
            elif found is not SAME:
                await sides.renew_qemu(target, incoming=True)
        assert "Traceback" not in sides.logs()


async def reach(network: Netns, qemu: Machinery) -> None:
    """The guest in `qemu` has its network, both ways."""
    assert qemu.guest is not None
    await network.run("ping", "-c", "1", "-W", "5", traffic.GUEST)
    await qemu.guest.run(f"ping -c 1 -W 5 {traffic.HOST}")


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.parametrize("victim", [Victim.TARGET_QEMU, Victim.TARGET_SERVER])
async def test_the_guest_stays(victim: Victim, bed: Bed, netns: Netns, tmp_path: Path) -> None:
    """The same Linux through all of it."""
    async with open_sides(bed, tmp_path, netns) as sides:
        source, target = await sides.make(1, incoming=False), await sides.make(2, incoming=True)
        for row, end in rows(victim, SAME, BACK, STOP):
            said = await kill(row, victim, source, target)
            assert outcome(said, row, victim, end) is end
            await check(end, victim, source, target)
            if end is STOP:
                await source.qemu.monitor.execute("cont")
            await reach(netns, source.qemu)
            if victim is Victim.TARGET_SERVER:
                await sides.renew_server(target, incoming=True)
            else:
                await sides.renew_qemu(target, incoming=True)
        assert source.qemu.guest is not None
        await traffic.check_integrity(source.qemu.guest, netns, 1)
        assert await source.qemu.guest.kernel_complaints() == []
        assert "Traceback" not in sides.logs()


@pytest.mark.e2e
@pytest.mark.slow
async def test_the_guest_arrives(bed: Bed, netns: Netns, tmp_path: Path) -> None:
    """From each target it goes on to the next, and from side to side."""
    async with open_sides(bed, tmp_path, netns) as sides:
        source, target = await sides.make(1, incoming=False), await sides.make(2, incoming=True)
        for victim in (Victim.SOURCE_QEMU, Victim.SOURCE_SERVER):
            for row, end in rows(victim, THERE):
                said = await kill(row, victim, source, target)
                found = outcome(said, row, victim, end)
                await check(found, victim, source, target)
                if found is THERE:
                    await reach(netns, target.qemu)
                    source, target = target, source
                else:
                    await sides.renew_server(source, incoming=False)
                if victim is Victim.SOURCE_SERVER and found is THERE:
                    await sides.renew_server(target, incoming=True)
                else:
                    await sides.renew_qemu(target, incoming=True)
        assert source.qemu.guest is not None
        await traffic.check_integrity(source.qemu.guest, netns, 1)
        assert await source.qemu.guest.kernel_complaints() == []
        assert "Traceback" not in sides.logs()


# --- the command itself -------------------------------------------------------------------------

SENT: Final = [*ENDS][[*ENDS].index("switch over, under way") :]
"""The rows in which QEMU sends all, on its own if need be."""
STOPS: Final = [*ENDS][[*ENDS].index("pre-copy, under way") :]
"""The rows in which the source stops, as soon as little is left to be sent."""


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.parametrize("append", ["", "pci=nomsi"])
async def test_the_command_dies(append: str, bed: Bed, netns: Netns, tmp_path: Path) -> None:
    """The servers let go, and what was left is taken back; INTx, which was off then, as well."""
    machine = attrs.evolve(LINUX, append=append)
    async with open_sides(bed, tmp_path, netns, machine) as sides:
        source, target = await sides.make(1, incoming=False), await sides.make(2, incoming=True)
        for row, end in rows(Victim.COMMAND, HELD, TWIN):
            if append and row != "mark pages":
                continue
            assert (await kill(row, Victim.COMMAND, source, target)).code == -SIGKILL
            if row not in STOPS:
                assert await source.qemu.status() == "running"
            else:
                await source.qemu.wait_status("postmigrate" if row in SENT else "finish-migrate")
            if end is HELD:
                await target.qemu.wait_status("paused" if row in SENT else "inmigrate")
            else:
                await target.qemu.wait_status("running")
            await source.server.wait_free(connected=True)
            await target.server.wait_free(connected=True)
            if row in ("stop devices", "run"):
                await look_at_next_attempt(source, target)
            if row == "save devices":  # once, --take-back finds that the target has ended
                await discard(target.qemu)
            words = ("migrate-vm", "--take-back", *arguments(source, target))
            said = await run("vfio_user_virtio_server", *words)
            if end is TWIN:
                assert said.code == EX_IOERR
                assert "the guest is there, so end the source" in said.text
                await reach(netns, target.qemu)
                source, target = target, source
                continue
            assert said == Said(0, "")
            await check(BACK, Victim.COMMAND, source, target)
            await reach(netns, source.qemu)
            await sides.renew_qemu(target, incoming=True)
        guest = source.qemu.guest
        assert guest is not None
        await traffic.check_integrity(guest, netns, 1)
        assert await guest.kernel_complaints() == []
        assert "Traceback" not in sides.logs()


async def look_at_next_attempt(source: Side, target: Side) -> None:
    """It refuses and says what is to be done."""
    said = await run("vfio_user_virtio_server", "migrate-vm", *arguments(source, target))
    assert said.code == EX_CONFIG
    assert "--take-back, if a migrate-vm that was killed" in said.text
    assert said.text.endswith("nothing was changed\n")
