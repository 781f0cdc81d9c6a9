"""The server under test as people run it: its own process, started by its command.

It is ready when it says so by `NOTIFY_SOCKET` (sd_notify(3)), so that nothing here polls.  What a
long run must keep flat (descriptors, mappings, memory) is read from /proc, which needs nothing of
the server.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

import attrs
import trio

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

COMMAND: Final = str(Path(sys.executable).with_name("vfio-user-virtio"))
START_SECONDS: Final = 20
STOP_SECONDS: Final = 5


class ServerFailed(Exception):
    """The server did not start or did not end as it should; the message says where its log is."""


@attrs.frozen
class Usage:
    """What a process holds: open descriptors, mappings, threads, resident memory in KiB."""

    fds: int
    maps: int
    threads: int
    rss_kib: int


@attrs.frozen
class ServerProcess:
    """A running server; `serve` makes one."""

    process: trio.Process
    log: Path

    def usage(self) -> Usage:
        proc = Path("/proc", str(self.process.pid))
        pages = int((proc / "statm").read_text().split()[1])
        return Usage(
            fds=len(os.listdir(proc / "fd")),
            maps=len((proc / "maps").read_text().splitlines()),
            threads=len(os.listdir(proc / "task")),
            rss_kib=pages * os.sysconf("SC_PAGESIZE") // 1024,
        )

    async def stop(self) -> int:
        """SIGTERM; the exit status."""
        self.process.send_signal(signal.SIGTERM)
        with trio.move_on_after(STOP_SECONDS):
            return await self.process.wait()
        raise ServerFailed(f"the server did not end in {STOP_SECONDS} s; see {self.log}")


@asynccontextmanager
async def serve(
    folder: Path,
    *argv: str,
    wrap: Callable[[list[str]], list[str]] | None = None,
    pass_fds: Sequence[int] = (),
) -> AsyncIterator[ServerProcess]:
    """`vfio-user-virtio serve ARGV`, ready for clients; raises `ServerFailed`.

    `folder`, which is there, gets its log.  `wrap` turns the command into the one that is run
    (`Netns.wrap`); it keeps the descriptors `pass_fds`.
    """
    path = folder / "server.log"
    address = folder / "notify"
    notify = trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_DGRAM)
    with notify, path.open("ab") as log:
        await notify.bind(str(address))
        command = [COMMAND, "serve", *argv]
        process = await trio.lowlevel.open_process(
            wrap(command) if wrap else command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=pass_fds,
            env={**os.environ, "NOTIFY_SOCKET": str(address)},
        )
        server = ServerProcess(process, path)
        try:
            await _wait_ready(notify, server)
            yield server
        finally:
            if process.returncode is None:
                process.kill()
            with trio.CancelScope(shield=True):
                await process.wait()
            address.unlink()


async def _wait_ready(notify: trio.socket.SocketType, server: ServerProcess) -> None:
    """Until READY, or until the process ends, whichever comes first."""
    ready = False

    async def end_with_process(scope: trio.CancelScope) -> None:
        await server.process.wait()
        scope.cancel()

    with trio.move_on_after(START_SECONDS):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(end_with_process, nursery.cancel_scope)
            while not ready:
                ready = b"READY=1" in (await notify.recv(4096)).splitlines()
            nursery.cancel_scope.cancel()
    if not ready:
        text = server.log.read_text(errors="replace")
        raise ServerFailed(f"the server did not start ({server.process.returncode}):\n{text}")
