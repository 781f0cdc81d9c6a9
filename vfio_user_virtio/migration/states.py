"""The migration states of a device: which single arcs there are, and the path between any two.

Why: a client asks for a state, and the way there may pass through others, each arc with commands
of its own.  The arcs are written down once, in `ARCS`; paths are derived from them, so the table
of all combinations that the VFIO documentation prints is a test, not a second source of truth.

Which arcs there are depends on two options.  With P2P the states RUNNING_P2P (and, with PRE_COPY,
PRE_COPY_P2P) take the place of the direct arc between running and stopped.  Without P2P and with
PRE_COPY the five states of the vfio-user specification remain.

The path is the shortest, with one rule.  A saving session is one stream: so a path from one saving
state to another stays among the saving states (PRE_COPY to STOP_COPY goes on in the same stream,
STOP_COPY to PRE_COPY cannot be), and any other path has saving states at its ends only.

Source: vfio-user, Device Migration; linux/vfio.h, enum vfio_device_mig_state, the behaviour of
vfio_mig_get_next_state.  Rejected: next hops as a second table, which could contradict the first.
"""

from __future__ import annotations

import errno
from collections import deque
from typing import TYPE_CHECKING, Final, TypeAlias

from vfio_user_virtio.errors import ClientError
from vfio_user_virtio.protocol.migration import MigrationFlags, MigrationState

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

Options: TypeAlias = MigrationFlags
"""Which of the optional states a device has."""

Arc: TypeAlias = tuple[MigrationState, MigrationState]
"""A single step, from the first state to the second."""

# The tables below, and those made of them, are read by the eye: so the states by short names.
ERROR: Final = MigrationState.ERROR
STOP: Final = MigrationState.STOP
RUNNING: Final = MigrationState.RUNNING
STOP_COPY: Final = MigrationState.STOP_COPY
RESUMING: Final = MigrationState.RESUMING
RUNNING_P2P: Final = MigrationState.RUNNING_P2P
PRE_COPY: Final = MigrationState.PRE_COPY
PRE_COPY_P2P: Final = MigrationState.PRE_COPY_P2P

SAVING: Final = frozenset({STOP_COPY, PRE_COPY, PRE_COPY_P2P})
"""The states in which a device can be read from."""

STOP_AND_COPY: Final = MigrationFlags.STOP_COPY
VFIO_USER: Final = MigrationFlags.STOP_COPY | MigrationFlags.PRE_COPY
"""The options of the vfio-user specification: its five states."""
WITHOUT_PRE_COPY: Final = MigrationFlags.STOP_COPY | MigrationFlags.P2P
EVERYTHING: Final = VFIO_USER | MigrationFlags.P2P

_ALWAYS: Final = frozenset({STOP_AND_COPY, VFIO_USER, WITHOUT_PRE_COPY, EVERYTHING})
_IF_P2P: Final = frozenset({WITHOUT_PRE_COPY, EVERYTHING})
_IF_PRE_COPY: Final = frozenset({VFIO_USER, EVERYTHING})
_IF_BOTH: Final = frozenset({EVERYTHING})
_IF_NOT_P2P: Final = frozenset({STOP_AND_COPY, VFIO_USER})
_IF_PRE_COPY_ONLY: Final = frozenset({VFIO_USER})

ARCS: Final[Mapping[Arc, frozenset[MigrationFlags]]] = {
    (STOP, STOP_COPY): _ALWAYS,
    (STOP_COPY, STOP): _ALWAYS,
    (STOP, RESUMING): _ALWAYS,
    (RESUMING, STOP): _ALWAYS,
    (RUNNING, STOP): _IF_NOT_P2P,
    (STOP, RUNNING): _IF_NOT_P2P,
    (RUNNING, RUNNING_P2P): _IF_P2P,
    (RUNNING_P2P, RUNNING): _IF_P2P,
    (RUNNING_P2P, STOP): _IF_P2P,
    (STOP, RUNNING_P2P): _IF_P2P,
    (RUNNING, PRE_COPY): _IF_PRE_COPY,
    (PRE_COPY, RUNNING): _IF_PRE_COPY,
    (PRE_COPY, STOP_COPY): _IF_PRE_COPY_ONLY,
    (PRE_COPY, PRE_COPY_P2P): _IF_BOTH,
    (PRE_COPY_P2P, PRE_COPY): _IF_BOTH,
    (RUNNING_P2P, PRE_COPY_P2P): _IF_BOTH,
    (PRE_COPY_P2P, RUNNING_P2P): _IF_BOTH,
    (PRE_COPY_P2P, STOP_COPY): _IF_BOTH,
}
"""Every single arc, and the options with which it is one."""


def path(current: MigrationState, wanted: int, options: MigrationFlags) -> tuple[Arc, ...]:
    """The arcs from `current` to `wanted`, a number as the client sent it; none if it is there.

    Raises ClientError(EINVAL) if there is no path: from or to ERROR, to a state that is none with
    these `options`, from STOP_COPY back to PRE_COPY.
    """
    found = _PATHS[options].get((current, wanted))
    if found is None:
        raise ClientError(errno.EINVAL, _why_not(current, wanted, options))
    return found


def supported_states(options: MigrationFlags) -> frozenset[MigrationState]:
    """The states that a client may ask for."""
    return frozenset(state for arc, where in ARCS.items() if options in where for state in arc)


def _why_not(current: MigrationState, wanted: int, options: MigrationFlags) -> str:
    if current == ERROR:
        return "the device is in state ERROR, which only a reset ends"
    states = supported_states(options)
    if wanted not in states:
        known = ", ".join(f"{state.name} ({state})" for state in sorted(states))
        return f"migration state {wanted} is asked for; this device has {known}"
    return (
        f"there is no way from {current.name} to {MigrationState(wanted).name}: "
        "end this migration first, by way of STOP or RUNNING"
    )


def _shortest(
    arcs: Iterable[Arc], start: MigrationState, goal: MigrationState
) -> tuple[Arc, ...] | None:
    inside = SAVING if {start, goal} <= SAVING else frozenset(MigrationState) - SAVING
    paths: dict[MigrationState, tuple[Arc, ...]] = {start: ()}
    queue = deque(paths)
    while queue and goal not in paths:
        here = queue.popleft()
        for arc in arcs:
            there = arc[1]
            if arc[0] == here and there not in paths and (there == goal or there in inside):
                paths[there] = (*paths[here], arc)
                queue.append(there)
    return paths.get(goal)


def _derive(options: MigrationFlags) -> dict[tuple[int, int], tuple[Arc, ...]]:
    arcs = [arc for arc, where in ARCS.items() if options in where]
    states = supported_states(options)
    found = {(start, goal): _shortest(arcs, start, goal) for start in states for goal in states}
    return {pair: way for pair, way in found.items() if way is not None}


_PATHS: Final = {options: _derive(options) for options in _ALWAYS}
