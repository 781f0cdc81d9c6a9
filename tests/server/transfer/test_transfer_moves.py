"""Transfers that are cut, damaged, refused, cancelled and slow at every step: who runs then."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

import pytest

from tests.server.transfer.transfer_rig import (
    HEADER_SIZE,
    SECONDS,
    Outcome,
    Wire,
    check_invariants,
    transfer,
)
from tests.transport.migration_pair import MAC_A, MAC_B, pair
from vfio_user_virtio.errors import ClientError, ConnectionLost, HostError
from vfio_user_virtio.migration.states import STOP_AND_COPY, VFIO_USER
from vfio_user_virtio.protocol.migration import MigrationState

if TYPE_CHECKING:
    from collections.abc import Callable

    import trio

REQUESTS: Final = [
    "source MIGRATION",
    "source MIG_DEVICE_STATE",
    "target MIGRATION",
    "target MIG_DEVICE_STATE",
    "target STOP_COPY",
    "target read",
    "target RUNNING",
    "target RESUMING",
    "source PRE_COPY",
    "source read",
    "target write",
    "source PRE_COPY_P2P",
    "source STOP_COPY",
    "source read",
    "target write",
    "target STOP",
    "target RUNNING_P2P",
    "target RUNNING",
    "source STOP",
]


async def whole() -> Wire:
    """A wire after a transfer that nothing was wrong with."""
    wire = Wire()
    async with pair() as both:
        outcome = await transfer(both, wire)
        assert (outcome.send_failure, outcome.receive_failure) == (None, None)
    return wire


async def failed(wire: Wire, *, one_way: bool = False) -> tuple[str, Outcome]:
    """Who runs after a transfer over `wire` that cannot succeed."""
    async with pair() as both:
        outcome = await transfer(both, wire, one_way=one_way)
        return check_invariants(both, outcome), outcome


async def test_what_is_asked_and_in_which_order() -> None:
    async with pair() as both:
        outcome = await transfer(both)
        assert (outcome.send_failure, outcome.receive_failure) == (None, None)
        assert check_invariants(both, outcome) == "target"
        assert both.requests == REQUESTS
        assert both.states[0] is MigrationState.STOP
        sending, receiving = outcome.sending, outcome.receiving
        assert sending.target_runs
        assert sending.byte_count == receiving.byte_count > 0
        assert sending.target_facts is not None
        assert (sending.target_facts.name, sending.target_facts.num_vectors) == ("b", 6)
        assert receiving.source_facts == sending.source_facts
        names = [span.name for span in sending.spans]
        assert names == ["prepare", "pre-copy", "stop", "copy", "resume", "finish"]
        assert [span.name for span in sending.spans if span.down] == names[2:5]


async def test_one_way() -> None:
    async with pair() as both:
        outcome = await transfer(both, one_way=True)
        assert (outcome.send_failure, outcome.receive_failure) == (None, None)
        assert check_invariants(both, outcome) == "target"
        assert outcome.sending.word_is_out
        assert not outcome.sending.target_runs, "it cannot know"
        assert both.states[0] is MigrationState.STOP


async def test_keep_source_and_rounds(autojump_clock: trio.testing.MockClock) -> None:
    async with pair() as both:
        outcome = await transfer(both, keep_source=True, rounds=2)
        assert both.states == [MigrationState.RUNNING] * 2
        assert both.requests.count("source info") == 2
        assert both.requests.count("target write") == 4
        assert outcome.sending.spans[1].seconds == pytest.approx(2.1)


@pytest.mark.parametrize(
    ("source", "precopy"), [(VFIO_USER, True), (STOP_AND_COPY, False)], ids=["pre-copy", "stop"]
)
async def test_servers_that_offer_less(source: object, *, precopy: bool) -> None:
    async with pair(source) as both:  # type: ignore[arg-type]  # one of the sets of options
        outcome = await transfer(both)
        assert check_invariants(both, outcome) == "target"
        assert outcome.sending.precopy == precopy
        assert ("source PRE_COPY" in both.requests) == precopy
        assert "source PRE_COPY_P2P" not in both.requests


@pytest.mark.parametrize("direction", ["forward", "backward"])
async def test_cut_at_every_frame(direction: str) -> None:
    """At each border and inside of each header and payload."""
    borders = (await whole()).borders(direction)
    found = []
    for border in borders:
        for position in (border, border + 7, border + HEADER_SIZE + 3):
            if position >= borders[-1]:
                continue
            runs, outcome = await failed(Wire(cut={direction: position}))
            found.append(runs)
            assert outcome.send_failure is not None
            if runs != "target":
                assert isinstance(outcome.receive_failure, ConnectionLost)
    assert len(found) > 12
    assert found[0] == "source"
    order = {"source": 0, "neither": 1, "target": 2}
    assert [order[runs] for runs in found] == sorted(order[runs] for runs in found)
    # The last on the way there is RUN that never came, on the way back RUNNING that was not heard.
    assert found[-1] == ("neither" if direction == "forward" else "target")


async def test_cut_one_way() -> None:
    """The reader ends early, and the writer gets to know of it, or not."""
    wire = Wire()
    async with pair() as both:
        await transfer(both, wire, one_way=True)
    borders = wire.borders("forward")
    for border in borders[:-1]:
        for position in (border, border + 7):
            runs, outcome = await failed(Wire(cut={"forward": position}), one_way=True)
            assert isinstance(outcome.receive_failure, ConnectionLost)
            assert runs != "target"
            if runs == "source":
                assert "takes no more" in str(outcome.send_failure)


@pytest.mark.parametrize(("direction", "step"), [("forward", 17), ("backward", 7)])
async def test_damaged_at_every_byte(direction: str, step: int) -> None:
    borders = (await whole()).borders(direction)
    for position in range(0, borders[-1], step):
        runs, outcome = await failed(Wire(flip={direction: position}))
        failure = outcome.receive_failure if direction == "forward" else outcome.send_failure
        assert "transfer stream" in str(failure), position
        in_the_last = position >= borders[-2]
        if direction == "forward":
            assert runs == "source", "also if RUN is damaged: the receiver says that it did not run"
            told = position >= borders[1]  # whoever has not said HELLO is not answered
            assert isinstance(outcome.send_failure, HostError) == told
            assert ("the receiver refuses: " in str(outcome.send_failure)) == told
        else:
            assert runs == ("target" if in_the_last else "source")


async def test_damaged_one_way() -> None:
    """Nobody tells the sender: the target does not run, and the source is stopped at the end."""
    for position in (3, 100, 700):
        runs, outcome = await failed(Wire(flip={"forward": position}), one_way=True)
        assert runs in ("neither", "source")
        assert "transfer stream" in str(outcome.receive_failure)


def at_request(number: int, do: Callable[[], None]) -> Callable[[list[str]], Callable[[], None]]:
    """What does something at a request, by its number."""

    def made(requests: list[str]) -> Callable[[], None]:
        def meddle() -> None:
            if len(requests) == number + 1:
                do()

        return meddle

    return made


@pytest.mark.parametrize("number", range(len(REQUESTS)))
async def test_refused_at_every_request(number: int) -> None:
    def refuse() -> None:
        raise ClientError(errno.EIO, "no")

    async with pair() as both:
        both.source.meddle = both.target.meddle = at_request(number, refuse)(both.requests)
        outcome = await transfer(both)
        runs = check_invariants(both, outcome)
        assert outcome.send_failure is not None
        if number < len(REQUESTS) - 1:
            assert runs == "source"
            failed_at = outcome.send_failure
            assert "refuses" in str(failed_at) or "not offer" in str(failed_at)
        else:
            assert runs == "target"


@pytest.mark.parametrize("who", [0, 1], ids=["sender", "receiver"])
async def test_cancelled_at_every_request(who: int) -> None:
    for number in range(len(REQUESTS)):
        async with pair() as both:
            scopes: list[trio.CancelScope] = []

            def cancel(scopes: list[trio.CancelScope] = scopes) -> None:
                scopes[who].cancel()

            both.source.meddle = both.target.meddle = at_request(number, cancel)(both.requests)
            outcome = await transfer(both, cancel=lambda *ends, s=scopes: s.extend(ends))
            runs = check_invariants(both, outcome)
            too_late = number >= REQUESTS.index("target RUNNING", 7)
            assert runs == ("target" if too_late else "source"), REQUESTS[number]
            assert outcome.sending.target_runs == too_late, "it has heard of it"


async def test_a_target_that_does_not_fit_is_told_by_name() -> None:
    async with pair(target_pairs=1) as both:
        outcome = await transfer(both)
        assert check_invariants(both, outcome) == "source"
        assert "source STOP_COPY" not in both.requests, "it was found out while it ran"
        for failure in (outcome.send_failure, outcome.receive_failure):
            assert "the target would refuse what the source has, with: DEV_FEATURES" in str(failure)
        assert both.members[1].state.filter.mac == MAC_B


async def test_a_slow_wire(autojump_clock: trio.testing.MockClock) -> None:
    """Seven bytes at once, a hundred times a second."""
    async with pair() as both:
        outcome = await transfer(both, Wire(delay=0.01, piece=7))
        assert check_invariants(both, outcome) == "target"
        assert both.members[1].state.filter.mac == MAC_A
        assert outcome.sending.downtime > 0.5


async def test_a_wire_that_hangs(autojump_clock: trio.testing.MockClock) -> None:
    """Both give up after a while; the source runs."""
    async with pair() as both:
        outcome = await transfer(both, Wire(delay=SECONDS * 3, piece=200))
        assert check_invariants(both, outcome) == "source"
        assert "sent nothing for 5 s" in str(outcome.receive_failure)
