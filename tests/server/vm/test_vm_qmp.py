"""The monitor's client: its codec, and against a real QEMU."""

from __future__ import annotations

import contextlib
import json
import socket
from typing import TYPE_CHECKING

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from tests.server.vm.bare_qemu import bare_qemu
from vfio_user_virtio_server.vm import lines
from vfio_user_virtio_server.vm.errors import QemuError, QemuGone
from vfio_user_virtio_server.vm.lines import LineDecoder
from vfio_user_virtio_server.vm.qmp import (
    Event,
    Greeting,
    Reply,
    decode_message_untrusted,
    encode_command,
    open_qmp,
)

if TYPE_CHECKING:
    from tests.testbed.bed import Bed

GREETING = b'{"QMP": {"version": {"qemu": {"micro": 3, "minor": 1, "major": 11}}}}\n'


@given(st.lists(st.binary(max_size=9).filter(lambda line: not set(line) & {10, 13})), st.data())
def test_lines_come_whole_however_they_are_cut(wanted: list[bytes], data: st.DataObject) -> None:
    whole = b"".join(line + b"\r\n" for line in wanted)
    decoder, got = LineDecoder(), []
    while whole:
        count = data.draw(st.integers(1, len(whole)))
        got += decoder.feed_untrusted(whole[:count])
        whole = whole[count:]
    assert got == wanted


def test_a_line_without_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "MAX_LINE", 9)
    decoder = LineDecoder()
    assert decoder.feed_untrusted(b"123456789") == []
    with pytest.raises(QemuError, match="more than 9 bytes"):
        decoder.feed_untrusted(b"0")


def test_messages() -> None:
    assert decode_message_untrusted(GREETING) == Greeting((11, 1, 3))
    assert decode_message_untrusted(b'{"return": {}, "id": 7}') == Reply(7, {})
    refused = b'{"error": {"class": "GenericError", "desc": "no"}, "id": 8}'
    assert decode_message_untrusted(refused) == Reply(8, error="no")
    stamp = b'"timestamp": {"seconds": 2, "microseconds": 500000}'
    happened = b'{"event": "STOP", %s}' % stamp
    assert decode_message_untrusted(happened) == Event("STOP", {}, 2.5)
    assert json.loads(encode_command("stop", 3, {})) == {
        "execute": "stop",
        "arguments": {},
        "id": 3,
    }


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["return", "error", "event", "QMP", "id", "desc", "timestamp", "data"]),
            inner,
        )
    ),
    max_leaves=12,
)


@given(st.binary() | JSON.map(lambda value: json.dumps(value).encode()))
def test_whatever_comes_is_a_message_or_refused(line: bytes) -> None:
    try:
        message = decode_message_untrusted(line)
    except QemuError:
        return
    assert isinstance(message, Reply | Event | Greeting)


async def greet(peer: trio.SocketStream) -> None:
    await peer.send_all(GREETING)
    assert b"qmp_capabilities" in await peer.receive_some()
    await peer.send_all(b'{"return": {}, "id": 1}\n')


async def test_who_waits_reads_for_all() -> None:
    ours, theirs = socket.socketpair()
    peer = trio.SocketStream(trio.socket.from_stdlib_socket(theirs))
    stack = contextlib.AsyncExitStack()
    async with peer:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(greet, peer)
            qmp = await stack.enter_async_context(open_qmp(ours, "q"))
        async with stack:
            assert qmp.version == (11, 1, 3)
            got: dict[str, object] = {}

            async def ask(name: str) -> None:
                got[name] = await qmp.execute(name)

            async def wait() -> None:
                got["event"] = (await qmp.wait_event(lambda event: event.name == "E")).name

            async with trio.open_nursery() as nursery:
                nursery.start_soon(wait)
                for name in ("a", "b"):
                    nursery.start_soon(ask, name)
                sent = b""
                while sent.count(b"\n") < 2:
                    sent += await peer.receive_some()
                commands = [json.loads(line) for line in sent.splitlines()]
                stamp = b'"timestamp": {"seconds": 2, "microseconds": 0}'
                await peer.send_all(b'{"event": "E", %s}\n{"event": "F", %s}\n' % (stamp, stamp))
                for command in reversed(commands):
                    reply = {"return": command["execute"], "id": command["id"]}
                    await peer.send_all(json.dumps(reply).encode() + b"\n")
            assert got == {"a": "a", "b": "b", "event": "E"}
            assert (await qmp.wait_event(lambda event: True)).name == "F"

            with trio.move_on_after(0.01):
                await qmp.execute("c")
            stale = json.loads((await peer.receive_some()).splitlines()[-1])
            await peer.send_all(b'{"return": "stale", "id": %d}\n' % stale["id"])
            await peer.send_all(b'{"return": "fresh", "id": %d}\n' % (stale["id"] + 1))
            assert await qmp.execute("d") == "fresh"

            await peer.aclose()
            for _ in range(2):
                with pytest.raises(QemuGone):
                    await qmp.execute("e")
            await qmp.wait_gone()


async def test_what_is_no_qmp_ends_it() -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        theirs.sendall(b"SSH-2.0\n")
        with pytest.raises(QemuGone, match="no QMP"):
            async with open_qmp(ours, "q"):
                pass


async def test_a_monitor_that_says_nothing(autojump_clock: trio.testing.MockClock) -> None:
    ours, theirs = socket.socketpair()
    with theirs, pytest.raises(QemuError, match="one client at a time"):
        async with open_qmp(ours, "q"):
            pass


@pytest.mark.slow
async def test_a_real_one(bed: Bed) -> None:
    async with bare_qemu(bed, name="q1") as qmp:
        assert qmp.version >= (10, 1, 0)
        assert await qmp.execute("query-name") == {}
        with pytest.raises(QemuError, match=r"q1: qom-get: .*nowhere"):
            await qmp.execute("qom-get", path="/nowhere", property="type")
        await qmp.execute("cont")
        assert (await qmp.wait_event(lambda event: event.name == "RESUME")).seconds > 1e9
        await qmp.execute("quit")
        await qmp.wait_gone()
        with pytest.raises(QemuGone):
            await qmp.execute("query-name")
