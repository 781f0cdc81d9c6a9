"""A client of QEMU's monitor: commands that may overlap, events that are kept until waited for.

Source: QEMU, docs/interop/qmp-spec.rst.  A message is a JSON object in a line; the server greets,
``qmp_capabilities`` ends the negotiation, replies carry the request's ``id``.

The codec (`encode_command`, `decode_message_untrusted`) knows no socket.  A reply is told by its
id, so a caller that is cancelled leaves none behind for the next one.  The package ``qemu.qmp`` was
looked at: it is asyncio.
"""

from __future__ import annotations

import array
import contextlib
import json
import socket
from typing import TYPE_CHECKING, Final, TypeAlias

import attrs
import trio

from vfio_user_virtio_server.vm.errors import QemuError, QemuGone
from vfio_user_virtio_server.vm.lines import LineDecoder

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping, Sequence

Json: TypeAlias = "bool | int | float | str | Sequence[Json] | Mapping[str, Json] | None"

ANSWER_SECONDS: Final = 20.0
"""How long QEMU may take for one command; it holds its big lock while it starts devices."""

MAX_EVENTS: Final = 4096
"""Events that are kept for whoever waits for one: some hundreds come in a migration."""

_CHUNK: Final = 65_536


@attrs.frozen
class Reply:
    """The answer to command `ident`: `value`, or what QEMU says is wrong in `error`."""

    ident: int | None
    value: Json = None
    error: str | None = None


@attrs.frozen
class Event:
    """Something that happened; `seconds` since the epoch by QEMU's clock.

    `heard`: when it was read, by trio's clock; that is soon after if somebody waited for it.
    """

    name: str
    data: Mapping[str, Json]
    seconds: float
    heard: float = 0.0


@attrs.frozen
class Greeting:
    """The first message; `version` is (major, minor, micro)."""

    version: tuple[int, int, int]


def encode_command(name: str, ident: int, arguments: Mapping[str, Json]) -> bytes:
    """One command as a line."""
    message = {"execute": name, "arguments": arguments, "id": ident}
    return json.dumps(message).encode() + b"\n"


def decode_message_untrusted(line: bytes) -> Reply | Event | Greeting:
    """What one line says.  Raises QemuError if it is no QMP."""
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):
        raise _unreadable(line) from None
    match message:
        case {"return": value, **more}:
            return Reply(_ident(more.get("id")), value)
        case {"error": {"desc": str(text)}, **more}:
            return Reply(_ident(more.get("id")), error=text)
        case {
            "event": str(name),
            "timestamp": {"seconds": int(whole), "microseconds": int(micro)},
            **more,
        }:
            data = more.get("data", {})
            return Event(name, data if isinstance(data, dict) else {}, whole + micro / 1e6)
        case {
            "QMP": {
                "version": {"qemu": {"major": int(major), "minor": int(minor), "micro": int(fix)}}
            }
        }:
            return Greeting((major, minor, fix))
        case _:
            raise _unreadable(line)


class Qmp:
    """The monitor of one QEMU, called `name` in messages.  Made by `open_qmp`.

    There is no task behind it: whoever waits reads, and keeps what belongs to others.
    """

    def __init__(self, sock: trio.socket.SocketType, name: str) -> None:
        self.name = name
        self.version = (0, 0, 0)
        self._sock = sock
        self._decoder = LineDecoder()
        self._next_ident = 0
        self._events: list[Event] = []
        self._replies: dict[int, Reply | None] = {}
        self._failure: QemuGone | None = None
        self._reading = trio.Lock()
        self._sending = trio.Lock()

    async def execute(self, command: str, *, fds: Sequence[int] = (), **arguments: Json) -> Json:
        """What `command` returns; ``_`` in an argument's name stands for ``-``.

        `fds` go along (``getfd``).  Raises QemuError.
        """
        self._next_ident += 1
        ident = self._next_ident
        named = {key.replace("_", "-"): value for key, value in arguments.items()}
        self._replies[ident] = None
        try:
            with trio.fail_after(ANSWER_SECONDS):
                await self._send(encode_command(command, ident, named), fds)
                while (reply := self._replies[ident]) is None:
                    await self._receive(lambda: self._replies[ident] is not None)
        except trio.TooSlowError:
            raise QemuError(
                f"{self.name}: no answer to {command} in {ANSWER_SECONDS:g} s"
            ) from None
        finally:
            del self._replies[ident]
        if reply.error is not None:
            raise QemuError(f"{self.name}: {command}: {reply.error}")
        return reply.value

    async def wait_event(self, wanted: Callable[[Event], bool]) -> Event:
        """The first event, of those that were not taken yet, that is `wanted`; it is taken.

        Raises QemuGone if the connection ends.
        """
        while (event := self.take_event(wanted)) is None:
            await self._receive(lambda: any(map(wanted, self._events)))
        return event

    def take_event(self, wanted: Callable[[Event], bool]) -> Event | None:
        """The same of those that have come, if there is one."""
        event = next(filter(wanted, self._events), None)
        if event is not None:
            self._events.remove(event)
        return event

    def forget_events(self) -> None:
        """Wait for none of those that have come."""
        self._events.clear()

    async def wait_gone(self) -> None:
        """Until the connection has ended, which is when QEMU has."""
        with contextlib.suppress(QemuGone):
            while True:
                await self._receive(lambda: False)

    async def start(self) -> None:
        """Take the greeting and end the negotiation.  Raises QemuError."""
        with trio.move_on_after(ANSWER_SECONDS) as patience:
            while self.version == (0, 0, 0):
                await self._receive(lambda: self.version != (0, 0, 0))
        if patience.cancelled_caught:
            raise QemuError(
                f"{self.name}: no greeting in {ANSWER_SECONDS:g} s; a monitor serves one client at "
                "a time, so give this command one of its own"
            )
        await self.execute("qmp_capabilities")

    async def _receive(self, done: Callable[[], bool]) -> None:
        """Take what comes, once, unless another task has taken what was wanted."""
        async with self._reading:
            if done():
                return
            if self._failure is not None:
                raise self._failure
            try:
                data = await self._sock.recv(_CHUNK)
                if not data:
                    self._failure = QemuGone(self.name, "has closed its monitor")
                for line in self._decoder.feed_untrusted(data):
                    self._take(decode_message_untrusted(line))
            except OSError as error:
                self._failure = self._lost(error)
            except QemuError as error:
                self._failure = QemuGone(self.name, f"is not understood: {error}")
            if self._failure is not None:
                raise self._failure

    def _take(self, message: Reply | Event | Greeting) -> None:
        match message:
            case Greeting(version):
                self.version = version
            case Event():
                del self._events[: 1 - MAX_EVENTS]
                self._events.append(attrs.evolve(message, heard=trio.current_time()))
            case Reply(int(ident)) if ident in self._replies:
                self._replies[ident] = message
            case Reply():
                pass  # whoever asked has been cancelled

    async def _send(self, data: bytes, fds: Sequence[int]) -> None:
        """All of a command, even if the caller is cancelled: half a line ruins the next."""
        try:
            async with self._sending:
                with trio.CancelScope(shield=True, deadline=trio.current_time() + ANSWER_SECONDS):
                    sent = await self._sock.sendmsg([data], [_rights(fds)] if fds else [])
                    while sent < len(data):
                        sent += await self._sock.send(data[sent:])
        except OSError as error:
            raise self._lost(error) from None

    def _lost(self, error: OSError) -> QemuGone:
        return QemuGone(self.name, f"is gone: its monitor says {error.strerror}")


@contextlib.asynccontextmanager
async def open_qmp(sock: socket.socket, name: str) -> AsyncIterator[Qmp]:
    """The monitor behind `sock`, which is connected and closed at the end.  Raises QemuError."""
    sock.setblocking(False)
    with trio.socket.from_stdlib_socket(sock) as connected:
        qmp = Qmp(connected, name)
        await qmp.start()
        yield qmp


def _rights(fds: Sequence[int]) -> tuple[int, int, bytes]:
    return socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds).tobytes()


def _ident(value: object) -> int | None:
    return value if isinstance(value, int) else None


def _unreadable(line: bytes) -> QemuError:
    return QemuError(f"what the monitor said is no QMP: {line[:60]!r}")
