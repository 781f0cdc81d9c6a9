"""Echo requests to a guest: sent, told from one another, counted; over the kernel's sockets."""

from __future__ import annotations

import os
import socket
import struct
import sys
from typing import TYPE_CHECKING, Final

import pytest
import trio

from vfio_user_virtio.errors import HostError
from vfio_user_virtio_server import pings
from vfio_user_virtio_server.pings import GRACE, INTERVAL, Answers, Ping, Pinger, open_pinger

if TYPE_CHECKING:
    from tests.testbed.netns import Netns

PROGRAM: Final = """
import sys, trio
from vfio_user_virtio.errors import HostError
from vfio_user_virtio_server.pings import open_pinger

async def main():
    for address in sys.argv[1:]:
        try:
            async with open_pinger(address) as pinger, trio.open_nursery() as nursery:
                nursery.start_soon(pinger.run)
                await pinger.answered()
                while sum(ping.answered is not None for ping in pinger.pings) < 3:
                    await trio.sleep(0.01)
                nursery.cancel_scope.cancel()
            print(address, "answers")
        except HostError as error:
            print(error, error.exit_code)

trio.run(main)
"""


@pytest.fixture(autouse=True)
def _sockets_of_unix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(pings._KINDS, socket.AF_UNIX, pings._KINDS[socket.AF_INET])


def pair() -> tuple[Pinger, socket.socket]:
    """A pinger whose requests come out of the socket; it takes itself for one of IPv4."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    for sock in (ours, theirs):
        sock.setblocking(False)
    return Pinger(ours, "guest"), theirs


async def test_what_is_answered_and_what_is_not(autojump_clock: trio.testing.MockClock) -> None:
    pinger, guest = pair()
    with guest, pinger._sender:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pinger.run)
            await trio.sleep(3.5 * INTERVAL)
            requests = [guest.recv(1024) for _ in range(4)]
            nursery.cancel_scope.cancel()
    assert [struct.unpack(">BBHHH", one[:8]) for one in requests] == [
        (8, 0, 0, 0, number) for number in range(4)
    ]
    sent = [ping.sent for ping in pinger.pings]
    assert sent == pytest.approx([sent[0] + number * INTERVAL for number in range(4)])

    def answer(number: int, kind: int = 0) -> None:
        pinger.take_untrusted(struct.pack(">BBHHH", kind, 0, 0, 0, number))

    answer(2)
    answer(1, kind=8)
    answer(7)
    pinger.take_untrusted(b"\0\0\0\0\0\0\0")
    first = pinger.pings[2].answered
    assert first == trio.current_time()
    assert [ping.answered is None for ping in pinger.pings] == [True, True, False, True]
    await trio.sleep(1)
    answer(2)
    assert pinger.pings[2].answered == first, "the second answer is passed over"
    await pinger.answered()


async def test_numbers_come_round() -> None:
    pinger, guest = pair()
    with guest, pinger._sender:
        pinger.pings += [Ping(0.0, None)] * 0x1_0002
        pinger.take_untrusted(struct.pack(">BBHHH", 0, 0, 0, 0, 1))
        pinger.take_untrusted(struct.pack(">BBHHH", 0, 0, 0, 0, 5))
    answered = [number for number, ping in enumerate(pinger.pings) if ping.answered is not None]
    assert answered == [5, 0x1_0001], "the last that had the number"


async def test_nobody_answers(autojump_clock: trio.testing.MockClock) -> None:
    pinger, guest = pair()
    with pinger._sender:
        guest.close()  # so that sending fails as well
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pinger.run)
            with pytest.raises(HostError, match=r"guest does not answer .* in 10 s") as caught:
                await pinger.answered()
            nursery.cancel_scope.cancel()
    assert caught.value.exit_code == os.EX_NOHOST
    assert len(pinger.pings) > 100


async def test_a_name_that_is_none() -> None:
    with pytest.raises(HostError, match=r"cannot send echo requests to no such host: ") as caught:
        async with open_pinger("no such host"):
            pass
    assert caught.value.exit_code == os.EX_NOHOST


async def test_by_the_kernel(netns: Netns) -> None:
    """A namespace begins with nobody allowed."""
    command = netns.wrap([sys.executable, "-c", PROGRAM])

    async def run(*addresses: str) -> list[str]:
        env = os.environ | {"PYTHONPATH": ":".join(sys.path)}
        with trio.fail_after(60):
            done = await trio.run_process([*command, *addresses], capture_stdout=True, env=env)
        return done.stdout.decode().splitlines()

    assert await run("127.0.0.1") == [
        "cannot send echo requests to 127.0.0.1: Permission denied; no group of yours is in the "
        f"range of net.ipv4.ping_group_range {os.EX_NOPERM}"
    ]
    path = "/proc/sys/net/ipv4/ping_group_range"
    await netns.run("sh", "-c", f"echo 0 0 >{path}")
    assert await run("127.0.0.1", "::1", "192.0.2.1") == [
        "127.0.0.1 answers",
        "::1 answers",
        f"cannot send echo requests to 192.0.2.1: Network is unreachable {os.EX_NOHOST}",
    ]


def test_what_became_of_them() -> None:
    some = [Ping(1.0, 1.1), Ping(2.0, None), Ping(3.0, 5.5), Ping(4.0, 5.6), Ping(6.0, None)]
    told = Answers.of(some)
    assert (told.sent, told.unanswered, told.slowest) == (5, 2, 2.5)
    assert told.silence == pytest.approx(4.4)
    assert str(Answers.of(some)) == (
        "5 sent, 2 unanswered, the slowest after 2.5 s; no answer for 4.4 s at most"
    )
    assert str(Answers.of(some[1:2])) == "1 sent, 1 unanswered; no answer for 0 at most"
    assert Answers.of([Ping(1.0, 1.1), Ping(2.0, None), Ping(9.0, None)]).silence == 7.9
    assert Answers.of([]) == Answers(0, 0, None, 0.0)


async def test_the_last_ones_are_waited_for(autojump_clock: trio.testing.MockClock) -> None:
    pinger, guest = pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pinger.run)
        await trio.sleep(2.5 * INTERVAL)

        async def answer() -> None:
            await trio.sleep(GRACE / 2)
            assert len(pinger.pings) == 3, "it sends no more"
            for number in range(3):
                guest.send(struct.pack(">BBHHH", 0, 0, 0, 0, number))

        nursery.start_soon(answer)
        await pinger.settle()
        pinger.close()
    assert trio.current_time() < pinger.pings[0].sent + GRACE
    assert Answers.of(pinger.pings).unanswered == 0
    guest.close()


async def test_of_the_last_ones_nothing_is_known(autojump_clock: trio.testing.MockClock) -> None:
    pinger, guest = pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pinger.run)
        await trio.sleep(2 * GRACE - INTERVAL / 2)
        pinger.close()
    assert len(pinger.pings) == GRACE / INTERVAL
    assert Answers.of(pinger.pings).unanswered == GRACE / INTERVAL
    await pinger.settle()
    guest.close()
