"""A guest under a test's control: boots, runs commands, reboots, ends in order or is killed.

Commands go to the agent (`init.sh`) over a serial port whose other end is a socket pair given to
QEMU as a file descriptor, so that there is no path to wait for and no address to choose.  Replies
carry their length: a command may print anything.  Nothing here sleeps or polls.  Parsing a login
shell's console was rejected: kernel messages come in between.

There is no background task: whoever waits for a reply reads, and keeps what belongs to others.
That leaves a test's own exceptions as they are, not inside the group of a nursery.
"""

from __future__ import annotations

import base64
import contextlib
import re
import signal
import socket
import subprocess
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final

import attrs
import trio

from tests.testbed import initramfs
from tests.testbed.machine import CONSOLE_LOG
from tests.testbed.qmp import Qmp, QmpError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path
    from typing import NoReturn

    from tests.testbed.bed import Bed
    from tests.testbed.machine import Machine

BOOT_SECONDS: Final = 120
GRACE_SECONDS: Final = 10
MAX_COMMAND: Final = 4000
"""Bytes of a request: the guest's serial line discipline holds 4096."""

KERNEL_COMPLAINTS: Final = re.compile(
    r"BUG|WARNING|Oops|Call Trace|NETDEV WATCHDOG|nobody cared|blocked for"
)


class GuestFailed(Exception):
    """The guest or QEMU did not do as told; the message says where the logs are."""


@attrs.frozen
class Result:
    """A command's exit code and what it printed, standard error included."""

    code: int
    output: str


class Guest:
    """A running guest; `boot` makes one."""

    def __init__(
        self, process: trio.Process, agent: trio.SocketStream, qmp: Qmp, log: Path
    ) -> None:
        self.process = process
        self.qmp = qmp
        self.log = log
        self.boots = 0
        self._agent = agent
        self._buffer = bytearray()
        self._replies: dict[int, Result] = {}
        self._next_id = 0
        self._reading = trio.Lock()
        self._writing = trio.Lock()

    async def run(self, script: str, seconds: float = 30) -> str:
        """What a shell script printed; raises `GuestFailed` if it fails or takes too long."""
        result = await self.execute(script, seconds)
        if result.code:
            raise GuestFailed(f"`{script}` failed with {result.code}:\n{result.output}")
        return result.output

    async def execute(self, script: str, seconds: float = 30) -> Result:
        """Runs a shell script in the guest; several may run at once."""
        self._next_id += 1
        ident = self._next_id
        encoded = base64.b64encode(script.encode()).decode()
        request = f"{ident} {int(seconds) + 1} {encoded}\n".encode()
        if len(request) > MAX_COMMAND:
            raise GuestFailed(f"request of {len(request)} bytes; the limit is {MAX_COMMAND}")
        boots = self.boots
        await self._send(request)
        with trio.move_on_after(seconds + GRACE_SECONDS):
            while ident not in self._replies:
                await self._receive(lambda: ident in self._replies)
                if self.boots != boots:
                    raise GuestFailed(f"the guest rebooted during `{script}`")
            return self._replies.pop(ident)
        raise GuestFailed(f"no answer to `{script}` in {seconds} s; see {self.log}")

    async def wait_boot(self, number: int) -> None:
        """Until the guest's user space has come up for the `number`th time."""
        with trio.move_on_after(BOOT_SECONDS):
            while self.boots < number:
                await self._receive(lambda: self.boots >= number)
            return
        raise GuestFailed(f"the guest did not boot in {BOOT_SECONDS} s; see {self.log}")

    async def reboot(self) -> None:
        """A reset by the guest itself; needs a `restartable` machine."""
        boots = self.boots
        script = base64.b64encode(b"reboot -f").decode()
        await self._send(f"0 60 {script}\n".encode())
        await self.wait_boot(boots + 1)

    async def kernel_complaints(self) -> list[str]:
        """Lines of the kernel's log that tell of its own trouble."""
        log = await self.run("dmesg")
        return [line for line in log.splitlines() if KERNEL_COMPLAINTS.search(line)]

    async def quit(self) -> None:
        """Ends QEMU by its monitor; returns when it has ended."""
        with trio.move_on_after(GRACE_SECONDS):
            with contextlib.suppress(QmpError, trio.BrokenResourceError):  # gone unanswered
                await self.qmp.execute("quit")
            await self.process.wait()
            return
        await self.kill()

    async def kill(self) -> None:
        """SIGKILL, and until the process is gone."""
        if self.process.returncode is None:
            self.process.send_signal(signal.SIGKILL)
        await self.process.wait()

    async def _send(self, request: bytes) -> None:
        try:
            async with self._writing:
                await self._agent.send_all(request)
        except trio.BrokenResourceError:
            await self._gone()

    async def _receive(self, done: Callable[[], bool]) -> None:
        """Takes at least one frame, unless another task has taken the one wanted."""
        async with self._reading:
            if done():
                return
            data = b""
            with contextlib.suppress(trio.BrokenResourceError):
                data = await self._agent.receive_some()
            if not data:
                await self._gone()
            self._buffer += data
            while self._take_frame():
                pass

    def _take_frame(self) -> bool:
        line, newline, rest = self._buffer.partition(b"\n")
        if not newline:
            return False
        if line.endswith(b"hello"):  # a firmware may have written to every serial port before
            self.boots += 1
            self._buffer = rest
            return True
        ident, code, length = map(int, line.split())
        if len(rest) < length:
            return False
        self._replies[ident] = Result(code, rest[:length].decode(errors="replace"))
        self._buffer = rest[length:]
        return True

    async def _gone(self) -> NoReturn:
        code = await self.process.wait()
        raise GuestFailed(f"QEMU ended with {code}; see {self.log}")


async def _start_monitor(guest: Guest) -> None:
    try:
        await guest.qmp.start()
    except (QmpError, trio.BrokenResourceError) as error:
        code = await guest.process.wait()
        raise GuestFailed(f"QEMU did not start ({code}); see {guest.log.parent}") from error


def _write_initrd(bed: Bed, machine: Machine, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "initrd.cpio"
    with path.open("wb") as file:
        file.write(initramfs.build(bed, machine.all_modules, machine.programs))
        for archive in machine.archives:
            file.write(archive.read_bytes())
    return path


@asynccontextmanager
async def start(
    bed: Bed, machine: Machine, folder: Path, wrap: Callable[[list[str]], list[str]] | None = None
) -> AsyncIterator[Guest]:
    """As `boot`, once its QEMU answers: one that is to arrive (``-incoming``) never boots."""
    initrd = _write_initrd(bed, machine, folder)
    agent, agent_theirs = socket.socketpair()
    monitor, monitor_theirs = socket.socketpair()
    with agent_theirs, monitor_theirs, (folder / "qemu.log").open("wb") as log:
        fds = (agent_theirs.fileno(), monitor_theirs.fileno())
        argv = machine.argv(bed, folder, initrd, *fds)
        process = await trio.lowlevel.open_process(
            wrap(argv) if wrap else argv,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=fds,
        )
    agent_stream = trio.SocketStream(trio.socket.from_stdlib_socket(agent))
    monitor_stream = trio.SocketStream(trio.socket.from_stdlib_socket(monitor))
    async with agent_stream, monitor_stream:
        qmp = Qmp(monitor_stream)
        guest = Guest(process, agent_stream, qmp, folder / CONSOLE_LOG)
        try:
            await _start_monitor(guest)
            yield guest
        finally:
            with trio.CancelScope(shield=True):
                await guest.quit()


@asynccontextmanager
async def boot(
    bed: Bed, machine: Machine, folder: Path, wrap: Callable[[list[str]], list[str]] | None = None
) -> AsyncIterator[Guest]:
    """A guest whose user space is up; its end is QEMU's, in order.

    `folder` is the guest's own: it gets the console's log and QEMU's standard error.  `wrap` turns
    QEMU's command into the one that is run (`Netns.wrap`).
    """
    async with start(bed, machine, folder, wrap) as guest:
        await guest.wait_boot(1)
        yield guest
