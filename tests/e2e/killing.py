"""``vfio-user-virtio migrate-vm``, which kills a process at a moment.

Arguments: the moment, the process (0 is this one), and what ``migrate-vm`` takes.  A moment is the
beginning of a step, by its name, or one of `WITHIN`.  The victim is dead, with all its connections,
before the step goes on: so each run meets the same.
"""

from __future__ import annotations

import functools
import os
import select
import signal
import sys
from typing import TYPE_CHECKING, Final

import attrs

from vfio_user_virtio_server import main
from vfio_user_virtio_server.vm import move, pci_state
from vfio_user_virtio_server.vm.qmp import Qmp

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from vfio_user_virtio_server.vm.move import Move, Step

WITHIN: Final[dict[str, tuple[object, str, str]]] = {
    "pre-copy, under way": (Qmp, "execute", "migrate"),
    "save devices, under way": (pci_state, "capture", ""),
    "switch over, under way": (Qmp, "execute", "migrate-continue"),
    "run, told": (Qmp, "execute", "cont"),
}
"""Within a step, what has just been done: a function of a class or module, and the first word that
it was called with, if that matters."""

DEATH_SECONDS: Final = 10


def kill(pid: int) -> None:
    """SIGKILL, and until the process has ended."""
    if pid == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    descriptor = os.pidfd_open(pid)
    signal.pidfd_send_signal(descriptor, signal.SIGKILL)
    assert select.select([descriptor], [], [], DEATH_SECONDS)[0], f"{pid} does not end"
    os.close(descriptor)


def at_beginning(step: Step, pid: int) -> Step:
    async def do(move: Move) -> None:
        kill(pid)
        await step.do(move)

    return attrs.evolve(step, do=do)


def behind(place: object, name: str, word: str, pid: int) -> None:
    original: Callable[..., Awaitable[object]] = getattr(place, name)

    @functools.wraps(original)
    async def wrapped(*arguments: object, **more: object) -> object:
        value = await original(*arguments, **more)
        if not word or word in arguments:
            setattr(place, name, original)
            kill(pid)
        return value

    setattr(place, name, wrapped)


def run(moment: str, pid: int, arguments: list[str]) -> int:
    if moment in WITHIN:
        behind(*WITHIN[moment], pid)
    else:
        assert moment in {step.name for step in move.STEPS}, moment
        steps = [at_beginning(step, pid) if step.name == moment else step for step in move.STEPS]
        move.STEPS = tuple(steps)  # type: ignore[misc, assignment]  # only a test has others
    return main.main(["migrate-vm", *arguments])


if __name__ == "__main__":
    sys.exit(run(sys.argv[1], int(sys.argv[2]), sys.argv[3:]))
