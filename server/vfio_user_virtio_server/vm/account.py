"""What is told of a move: to programs, to people, as a picture, and while it goes on.

Phases are told by our clock.  When the guest stopped and went on is told twice: by the clocks of
the QEMUs, which is exact if these are on one host, and by when we heard of it, so that it can be
drawn beside the phases.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import attrs

from vfio_user_virtio_server.pings import Answers
from vfio_user_virtio_server.report import Report
from vfio_user_virtio_server.vm.move import LOOK, PRE_COPY, STOPPED, SWITCH_OVER
from vfio_user_virtio_server.words import amount, duration, rate

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from vfio_user_virtio_server.pings import Ping
    from vfio_user_virtio_server.spans import Span
    from vfio_user_virtio_server.vm.move import Move, MovedDevice

RATE_LOOKS: Final = 11
"""Looks at QEMU that are a second apart in all."""


@attrs.frozen
class Account:
    """Of a move between the QEMUs called `source` and `target`; `pings` to the guest meanwhile."""

    source: str
    target: str
    pings: Sequence[Ping] = ()

    # --- when it is done -----------------------------------------------------------------------

    def described(self, done: Move) -> dict[str, object]:
        """For programs."""
        return {
            "from": self.source,
            "to": self.target,
            "devices": [
                {
                    "id": one.ident,
                    "from": one.source.device,
                    "to": one.target.device,
                    "image_bytes": one.image_bytes,
                    "written_bytes": one.written_bytes,
                    "logged": one.logged,
                }
                for one in done.devices
            ],
            "phases": [
                {
                    "name": phase.name,
                    "start": phase.start - done.phases[0].start,
                    "seconds": phase.seconds,
                    "byte_count": phase.byte_count,
                    "page_count": phase.page_count,
                }
                for phase in done.phases
            ],
            "seconds": seconds(done),
            "stopped_seconds": stopped_seconds(done),
            "downtime_seconds": done.downtime,
            "packets": attrs.asdict(Answers.of(self.pings)) if self.pings else None,
            "failed": done.failed,
        }

    def lines(self, done: Move) -> Iterator[str]:
        """For people."""
        yield (
            f"{self.source} to {self.target} in {duration(seconds(done))}, downtime {_down(done)}"
        )
        for phase in done.phases:
            moved = f"{phase.byte_count:>16,} bytes" if phase.byte_count else ""
            moved += f"{phase.page_count:>16,} pages" if phase.page_count else ""
            yield f"    {phase.name:<18}{duration(phase.seconds):>12}{moved}"
        for one in done.devices:
            yield f"    {one.ident}: {_of_device(one)}"
        if self.pings:
            yield f"    packets to the guest: {Answers.of(self.pings)}"
        yield f"    {done.standing}"

    # --- whatever became of it -----------------------------------------------------------------

    def drawn(self, move: Move | None, failure: str) -> Report:
        """As a picture; `move` is None if it did not come to that."""
        title = f"{self.source} to {self.target}"
        if move is None:
            return Report(title, [], failure=failure)
        stopped = _stopped(move)
        return Report(
            title,
            [_drawn(phase, stopped) for phase in move.phases],
            self.pings,
            dict(_facts(move)) | ({} if failure else {"outcome": move.standing}),
            failure,
            [(time, ram.left) for time, ram in move.looks],
            stopped,
        )


def notes(move: Move) -> Iterator[str]:
    """What to know before it takes its time; each line is ended."""
    for one in move.devices:
        if not one.logged:
            yield (
                f"vfio-user-virtio: {one.ident}: the IOMMU of the source's host cannot tell which "
                "pages it writes, so the guest is stopped before its memory is copied\n"
            )


def progress(move: Move) -> str:
    """How far QEMU's pre-copy is, which has been looked at, in a line.

    The rate is that of the last second.  QEMU expects its limit of a downtime until it has been
    through all memory once.  What the devices add is estimated by how long it took to look at them:
    that asks the same four processes much the same things.
    """
    now, ram = move.looks[-1]
    said = [f"{amount(ram.sent)} sent", f"{amount(ram.left)} left"]
    then, earlier = move.looks[-RATE_LOOKS:][0]
    if now > then:
        said.append(rate((ram.sent - earlier.sent) / (now - then)))
    if ram.downtime is not None:
        limit = "up to " if ram.rounds <= 1 else ""
        looked = sum(phase.seconds for phase in move.phases if phase.name == LOOK)
        more = duration(float(f"{looked:.1g}"))
        said.append(f"downtime {limit}{duration(ram.downtime)} + ~{more} for devices")
    if ram.rounds > 1:
        said.append(f"round {ram.rounds}")
    return ", ".join(said)


def seconds(done: Move) -> float:
    return sum(phase.seconds for phase in done.phases)


def stopped_seconds(done: Move) -> float:
    """What our own steps add to QEMU's downtime."""
    return sum(
        phase.seconds
        for phase in done.phases
        if phase.name in STOPPED and phase.name != SWITCH_OVER
    )


def _down(move: Move) -> str:
    down = "unknown" if move.downtime is None else duration(move.downtime)
    return f"{down}, of which for the devices {duration(stopped_seconds(move))}"


def _of_device(one: MovedDevice) -> str:
    wrote = f"{one.written_bytes:,} that it wrote to the guest's memory"
    if not one.logged:
        wrote = "stopped before the guest's memory was copied"
    return f"{one.image_bytes:,} bytes of its own, {wrote}"


def _facts(move: Move) -> Iterator[tuple[str, str]]:
    if move.facts:
        source = move.facts[0]
        machine = source.machine.removesuffix("-machine")
        memory = amount(sum(size for size, _ in source.memory.values()))
        here, there = [".".join(map(str, facts.version)) for facts in move.facts]
        yield "guest", f"{machine}, {memory} of memory, CPUs: {len(source.cpus)}"
        yield "QEMU", f"{here} to {there}"
    for one in move.devices:
        names = f"{one.source.device} to {one.target.device}"
        if one.source.device == one.target.device:
            names = f"{one.source.device} at both servers"
        moved = f"; {_of_device(one)}" if one.image_bytes else ""
        yield f"device {one.ident}", f"{names}{moved}"
    for phase in move.phases:
        if phase.name == PRE_COPY and phase.byte_count and phase.seconds:
            rounds = f", rounds: {move.looks[-1][1].rounds}" if move.looks else ""
            yield "pre-copy", f"{rate(phase.byte_count / phase.seconds)}{rounds}"
    if move.downtime is not None:
        stood = _down(move) if move.target_runs else duration(move.downtime)
        yield "by the QEMUs' clocks", f"stopped for {stood}"


def _stopped(move: Move) -> tuple[float, float] | None:
    """From when to when the guest did not run, by the clock of the phases."""
    if move.stopped is None:
        return None
    end = max(phase.end for phase in move.phases) if move.resumed is None else move.resumed.heard
    return move.stopped.heard, end


def _drawn(phase: Span, stopped: tuple[float, float] | None) -> Span:
    """Pages that are marked do not move: QEMU sends them, and counts their bytes, later."""
    down = phase.down
    if stopped is not None:
        begins, middle = phase.start, phase.start + phase.seconds / 2
        down = any(stopped[0] <= one < stopped[1] for one in (begins, middle))
    note = f"{phase.page_count:,} pages marked" if phase.page_count else ""
    return attrs.evolve(phase, down=down, page_count=0, note=note)
