"""A client of QEMU's test protocol: I/O ports and guest-physical memory of a VM, from outside.

It is made for tests of QEMU without a processor (``-accel qtest``), yet its server works beside any
accelerator, and it is the only way of stock QEMU by which somebody outside can *write* to a device.
Nobody has to think of it when QEMU is started: `open_qtest` adds it by the monitor to one that runs
(``getfd``, ``chardev-add``, ``object-add qom-type=qtest``).

It stays there until that QEMU ends, with a listening socket that only this user can reach, and is
found again by the next who moves the guest: QEMU 11.1.3 cannot take it away.  After ``object-del``
its answers go to memory that is freed, and those of a second one do as well.

A QEMU on another host, whose monitor is forwarded (``ssh -L``), gets no descriptor that way: it
makes a socket of its own at a path of its host, which has to be forwarded as well (`Forwarded`).

A command is a line of words, numbers in C's notation; the answer is a line, ``OK`` and a value, or
``FAIL`` and why; ``IRQ …`` lines may come in between, if asked for.  `Qtest.run` sends many
commands at once, since a VM that is paused waits for each of them.

Measured with QEMU 11.1.3, under TCG.  Rejected: the human monitor's ``o`` and ``i``, which have no
counterpart for memory; the gdb stub, whose physical memory mode writes RAM, and no device.
Source: QEMU, system/qtest.c; qapi/qom.json, QtestProperties.
"""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final

import attrs
import trio

from vfio_user_virtio_server.vm.errors import QemuError, QemuGone
from vfio_user_virtio_server.vm.lines import LineDecoder

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from vfio_user_virtio_server.vm.qmp import Json, Qmp

ANSWER_SECONDS: Final = 20.0
_CHUNK: Final = 65_536
_BATCH: Final = 256
"""Commands that are sent at once: neither their bytes nor those of the answers fill a socket."""
NAME: Final = "vfio-user-virtio-qtest"
"""What the protocol and its socket are called in QEMU."""


@attrs.frozen
class Forwarded:
    """The path `here` leads to the path `there` on QEMU's host, when somebody listens there."""

    here: str
    there: str


def decode_answer_untrusted(line: bytes) -> int | None:
    """The value that an answer has, or None.  Raises QemuError for a refusal."""
    words = line.decode("ascii", "replace").split()
    if not words or words[0] != "OK":
        raise QemuError(f"QEMU's test protocol refused a command: {line[:60]!r}")
    if len(words) == 1:
        return None
    try:
        return int(words[1], 16)
    except ValueError:
        raise QemuError(f"QEMU's test protocol answered {line[:60]!r}") from None


class Qtest:
    """The test protocol of the QEMU called `name`.  Made by `open_qtest`."""

    def __init__(self, sock: trio.socket.SocketType, name: str) -> None:
        self.name = name
        self._sock = sock
        self._decoder = LineDecoder()
        self._lock = trio.Lock()
        self._failure: QemuError | None = None

    async def run(self, commands: Sequence[str]) -> list[int | None]:
        """The answers to `commands`, in their order.  All are run, even if the caller is cancelled.

        Raises QemuError, when the last of them has been answered.
        """
        lines: list[bytes] = []
        async with self._lock:
            for start in range(0, len(commands), _BATCH):
                batch = commands[start : start + _BATCH]
                lines += await self._exchange("".join(f"{one}\n" for one in batch), len(batch))
        return [decode_answer_untrusted(line) for line in lines]

    async def ask(self, commands: Sequence[str]) -> list[int]:
        """The values that all of `commands` answer.  Raises QemuError."""
        values = [value for value in await self.run(commands) if value is not None]
        if len(values) != len(commands):
            raise QemuError(f"{self.name}: its test protocol answered without a value")
        return values

    async def _exchange(self, text: str, count: int) -> list[bytes]:
        if self._failure is not None:
            raise self._failure
        lines: list[bytes] = []
        data = text.encode()
        patience = trio.CancelScope(shield=True, deadline=trio.current_time() + ANSWER_SECONDS)
        try:
            with patience:
                while data:
                    data = data[await self._sock.send(data) :]
                while len(lines) < count:
                    data = await self._sock.recv(_CHUNK)
                    if not data:
                        raise QemuGone(self.name, "has closed its test protocol")
                    complete = self._decoder.feed_untrusted(data)
                    lines += [line for line in complete if not line.startswith(b"IRQ ")]
        except OSError as error:
            how = f"is gone: its test protocol says {error.strerror}"
            self._failure = QemuGone(self.name, how)
        except QemuError as error:
            self._failure = error
        if patience.cancelled_caught:
            self._failure = QemuError(
                f"{self.name}: no answer of its test protocol in {ANSWER_SECONDS:g} s"
            )
        if self._failure is not None:
            raise self._failure
        return lines


@contextlib.asynccontextmanager
async def open_qtest(qmp: Qmp, forwarded: Forwarded | None = None) -> AsyncIterator[Qtest]:
    """The test protocol of the QEMU behind `qmp`, which gets one if it has none.

    `forwarded`: how it is reached at another host.  Raises QemuError.
    """
    path = await socket_untrusted(qmp)
    if forwarded is not None:
        if path is None:
            await _add_there(qmp, forwarded.there)
        elif path != forwarded.there:
            raise QemuError(
                f"the test protocol of {qmp.name} is at {path} of its host already: forward "
                f"{forwarded.here} to that, instead of {forwarded.there}"
            )
        path = forwarded.here
    elif path is None:
        path = await _add(qmp)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with trio.socket.from_stdlib_socket(sock) as connected:
        sock.setblocking(False)
        try:
            await connected.connect(path)
        except OSError as error:
            raise QemuError(
                f"cannot reach the test protocol of {qmp.name} at {path}: {error.strerror}; "
                "it was added by the user who moved the guest last, on the host of that QEMU"
            ) from None
        yield Qtest(connected, qmp.name)


async def socket_untrusted(qmp: Qmp) -> str | None:
    """Where the protocol that was added earlier listens; None if there is none."""
    found = await qmp.execute("query-chardev")
    for one in found if isinstance(found, list) else ():
        match one:
            case {"label": str(label), "filename": str(filename)} if label == NAME:
                # "unix:PATH,server=on", and before it "disconnected:" without a client
                place = filename.removeprefix("disconnected:").removeprefix("unix:")
                return place.partition(",")[0]
    return None


def remove_socket_untrusted(path: str) -> None:
    """Remove what `_add` has made, if that is what `path` is, when its QEMU has ended."""
    folder = Path(path).parent
    if folder.name.startswith(f"{NAME}-") and folder.parent == Path(tempfile.gettempdir()):
        with contextlib.suppress(OSError):  # QEMU may have removed the socket, but not its folder
            os.unlink(path)
        with contextlib.suppress(OSError):
            folder.rmdir()


async def _add(qmp: Qmp) -> str:
    path = os.path.join(tempfile.mkdtemp(prefix=f"{NAME}-"), "socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(path)
        listener.listen(1)
        try:
            await qmp.execute("getfd", fds=[listener.fileno()], fdname=NAME)
        except QemuError as error:
            os.unlink(path)
            os.rmdir(os.path.dirname(path))
            if isinstance(error, QemuGone):
                raise
            raise QemuError(
                f"{error}; if it is on another host, forward a socket for its test protocol, too "
                "(--from-qtest, --to-qtest)"
            ) from None
    await _add_object(qmp, {"type": "fd", "data": {"str": NAME}})
    return path


async def _add_there(qmp: Qmp, path: str) -> None:
    """QEMU listens at `path` of its own host, and removes that at its end."""
    await _add_object(qmp, {"type": "unix", "data": {"path": path}})


async def _add_object(qmp: Qmp, address: Json) -> None:
    backend: Json = {"type": "socket", "data": {"addr": address, "server": True, "wait": False}}
    await qmp.execute("chardev-add", id=NAME, backend=backend)
    await qmp.execute("object-add", qom_type="qtest", id=NAME, chardev=NAME, log="none")
