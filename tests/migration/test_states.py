"""Derived paths against the tables of the standards, every (state, input) pair of every option."""

from __future__ import annotations

import errno
import itertools
from typing import Final

import pytest

from vfio_user_virtio.errors import ClientError
from vfio_user_virtio.migration.states import (
    ARCS,
    EVERYTHING,
    SAVING,
    STOP_AND_COPY,
    VFIO_USER,
    WITHOUT_PRE_COPY,
    Arc,
    path,
    supported_states,
)
from vfio_user_virtio.protocol.migration import MigrationFlags, MigrationState

ERROR, STOP, RUNNING, STOP_COPY, RESUMING, RUNNING_P2P, PRE_COPY, PRE_COPY_P2P = MigrationState
OPTIONS: Final = (STOP_AND_COPY, VFIO_USER, WITHOUT_PRE_COPY, EVERYTHING)

HOPS: Final = (STOP, RUNNING, PRE_COPY, PRE_COPY_P2P, STOP_COPY, RESUMING, RUNNING_P2P)
NEXT_HOP: Final[dict[MigrationState, tuple[MigrationState | None, ...]]] = {
    STOP: (STOP, RUNNING_P2P, RUNNING_P2P, RUNNING_P2P, STOP_COPY, RESUMING, RUNNING_P2P),
    RUNNING: (RUNNING_P2P, RUNNING, PRE_COPY, RUNNING_P2P, RUNNING_P2P, RUNNING_P2P, RUNNING_P2P),
    PRE_COPY: (RUNNING, RUNNING, PRE_COPY, PRE_COPY_P2P, PRE_COPY_P2P, RUNNING, RUNNING),
    PRE_COPY_P2P: (
        RUNNING_P2P,
        RUNNING_P2P,
        PRE_COPY,
        PRE_COPY_P2P,
        STOP_COPY,
        RUNNING_P2P,
        RUNNING_P2P,
    ),
    STOP_COPY: (STOP, STOP, None, None, STOP_COPY, STOP, STOP),
    RESUMING: (STOP, STOP, STOP, STOP, STOP, RESUMING, STOP),
    RUNNING_P2P: (STOP, RUNNING, RUNNING, PRE_COPY_P2P, STOP, STOP, RUNNING_P2P),
}
"""The full table of linux/vfio.h's states, for each wanted state in the order of `HOPS`."""

VFIO_USER_PATHS: Final = {
    (STOP, STOP): (STOP,),
    (STOP, RUNNING): (STOP, RUNNING),
    (STOP, STOP_COPY): (STOP, STOP_COPY),
    (STOP, RESUMING): (STOP, RESUMING),
    (STOP, PRE_COPY): (STOP, RUNNING, PRE_COPY),
    (RUNNING, STOP): (RUNNING, STOP),
    (RUNNING, RUNNING): (RUNNING,),
    (RUNNING, STOP_COPY): (RUNNING, STOP, STOP_COPY),
    (RUNNING, RESUMING): (RUNNING, STOP, RESUMING),
    (RUNNING, PRE_COPY): (RUNNING, PRE_COPY),
    (STOP_COPY, STOP): (STOP_COPY, STOP),
    (STOP_COPY, RUNNING): (STOP_COPY, STOP, RUNNING),
    (STOP_COPY, STOP_COPY): (STOP_COPY,),
    (STOP_COPY, RESUMING): (STOP_COPY, STOP, RESUMING),
    (STOP_COPY, PRE_COPY): None,
    (RESUMING, STOP): (RESUMING, STOP),
    (RESUMING, RUNNING): (RESUMING, STOP, RUNNING),
    (RESUMING, STOP_COPY): (RESUMING, STOP, STOP_COPY),
    (RESUMING, RESUMING): (RESUMING,),
    (RESUMING, PRE_COPY): (RESUMING, STOP, RUNNING, PRE_COPY),
    (PRE_COPY, STOP): (PRE_COPY, RUNNING, STOP),
    (PRE_COPY, RUNNING): (PRE_COPY, RUNNING),
    (PRE_COPY, STOP_COPY): (PRE_COPY, STOP_COPY),
    (PRE_COPY, RESUMING): (PRE_COPY, RUNNING, STOP, RESUMING),
    (PRE_COPY, PRE_COPY): (PRE_COPY,),
}
"""The vfio-user specification's five states, whole."""

INPUTS: Final = (*range(10), 1 << 31, (1 << 32) - 1)


def states_on(arcs: tuple[Arc, ...], start: MigrationState) -> tuple[MigrationState, ...]:
    return (start, *(arc[1] for arc in arcs))


def walk(
    current: MigrationState, wanted: MigrationState, options: MigrationFlags
) -> tuple[MigrationState, ...] | None:
    """The path as the kernel finds it: hop by hop in the full table, past what is unsupported."""
    supported = supported_states(options)
    found = [current]
    here = current
    while here != wanted:
        hop = NEXT_HOP[here][HOPS.index(wanted)]
        if hop is None:
            return None
        here = hop
        if here in supported:
            found.append(here)
    return tuple(found)


def found_path(
    current: MigrationState, wanted: int, options: MigrationFlags
) -> tuple[MigrationState, ...] | None:
    try:
        return states_on(path(current, wanted, options), current)
    except ClientError:
        return None


def test_next_hops_are_those_of_the_full_table() -> None:
    for current, wanted in itertools.product(HOPS, HOPS):
        hop = NEXT_HOP[current][HOPS.index(wanted)]
        found = found_path(current, wanted, EVERYTHING)
        assert (found and (*found, wanted)[1]) == hop, (current, wanted)


@pytest.mark.parametrize("options", OPTIONS)
def test_every_state_and_input(options: MigrationFlags) -> None:
    supported = supported_states(options)
    for current, wanted in itertools.product(MigrationState, INPUTS):
        expected = None
        if current in supported and wanted in supported:
            expected = walk(current, MigrationState(wanted), options)
        assert found_path(current, wanted, options) == expected, (current, wanted)


def test_the_five_states_of_vfio_user() -> None:
    assert supported_states(VFIO_USER) == {STOP, RUNNING, STOP_COPY, RESUMING, PRE_COPY}
    found = {pair: found_path(*pair, VFIO_USER) for pair in VFIO_USER_PATHS}
    assert found == VFIO_USER_PATHS
    assert len(VFIO_USER_PATHS) == len(supported_states(VFIO_USER)) ** 2


def test_supported_states() -> None:
    assert supported_states(STOP_AND_COPY) == {STOP, RUNNING, STOP_COPY, RESUMING}
    assert supported_states(WITHOUT_PRE_COPY) == supported_states(STOP_AND_COPY) | {RUNNING_P2P}
    assert supported_states(EVERYTHING) == set(MigrationState) - {ERROR}


@pytest.mark.parametrize("options", OPTIONS)
def test_a_path_is_made_of_single_arcs_and_is_the_only_shortest(options: MigrationFlags) -> None:
    arcs = [arc for arc, where in ARCS.items() if options in where]
    for current, wanted in itertools.product(supported_states(options), repeat=2):
        try:
            found = path(current, wanted, options)
        except ClientError:
            continue
        ways = [()] if not found else list(itertools.product(arcs, repeat=len(found)))
        joined = [way for way in ways if allowed(way, current, wanted)]
        assert joined == [found]
        for length in range(len(found)):
            shorter = itertools.product(arcs, repeat=length)
            assert not any(allowed(way, current, wanted) for way in shorter)


def allowed(way: tuple[Arc, ...], current: MigrationState, wanted: MigrationState) -> bool:
    states = states_on(way, current)
    if states[-1] != wanted or any(arc[0] != here for arc, here in zip(way, states, strict=False)):
        return False
    if current in SAVING and wanted in SAVING:
        return SAVING.issuperset(states)
    return SAVING.isdisjoint(states[1:-1])


@pytest.mark.parametrize("options", OPTIONS)
def test_a_stream_begins_on_the_last_arc_only(options: MigrationFlags) -> None:
    for current, wanted in itertools.product(supported_states(options), repeat=2):
        found = found_path(current, wanted, options)
        if found is None:
            continue
        for here, there in itertools.pairwise(found[:-1]):
            assert there != RESUMING
            assert here in SAVING or there not in SAVING


@pytest.mark.parametrize(
    ("current", "wanted", "says"),
    [
        (ERROR, RUNNING, "only a reset"),
        (STOP_COPY, PRE_COPY, "no way from STOP_COPY to PRE_COPY"),
        (RUNNING, RUNNING_P2P, "state 5 is asked for; this device has STOP (1)"),
        (RUNNING, ERROR, "state 0 is asked for"),
        (RUNNING, 77, "state 77 is asked for"),
    ],
)
def test_a_refusal_says_why(current: MigrationState, wanted: int, says: str) -> None:
    with pytest.raises(ClientError) as caught:
        path(current, wanted, VFIO_USER)
    assert caught.value.errno == errno.EINVAL
    assert says in str(caught.value)
