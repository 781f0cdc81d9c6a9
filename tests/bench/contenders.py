"""Starts what is measured, each as its own process, and speaks to it by a blocking socket.

The time of a round trip is taken by one loop for every contender: blocking calls in this process
cost the same for all, where a client in trio would cost more than the server under test.  A session
is set up by the library's own client; while the blocking loop runs, that client's task does not.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

import attrs
import trio

from tests.bench.figures import LIBVFIO_USER, NATIVE
from tests.testbed.server_process import COMMAND
from vfio_user_virtio.device import VfioRegion
from vfio_user_virtio.libvfio_user import LibraryError, load
from vfio_user_virtio.protocol.header import Command, encode_command
from vfio_user_virtio.protocol.region import encode_region_read_request
from vfio_user_virtio.transport.client import connect_socket

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from vfio_user_virtio.transport.client import Client

ECHO: Final = "trio echo"
"""The peer's column."""

ECHO_COMMAND: Final = (sys.executable, str(Path(__file__).with_name("echo_server.py")))
START_SECONDS: Final = 20
RETRY_SECONDS: Final = 0.001

REGISTER_READ: Final = encode_command(
    1, Command.REGION_READ, encode_region_read_request(0, VfioRegion.BAR4, 4)
)
"""32 bytes: device_feature_select, the first register of virtio's common configuration."""

assert len(REGISTER_READ) == 32


class DidNotStart(Exception):
    """A contender ended, or its socket never came."""


@attrs.frozen
class Contender:
    """A running process; `path` is its socket, or the first of several, and `log` what it said."""

    process: subprocess.Popen[bytes]
    path: Path
    log: Path

    async def connect(self, path: Path | None = None) -> socket.socket:
        """A blocking connection, as soon as somebody listens.  Raises DidNotStart."""
        where = str(path or self.path)
        with trio.move_on_after(START_SECONDS):
            while self.process.poll() is None:
                sock = socket.socket(socket.AF_UNIX)
                try:
                    sock.connect(where)
                except (FileNotFoundError, ConnectionRefusedError):
                    sock.close()
                    await trio.sleep(RETRY_SECONDS)
                    continue
                return sock
        said = self.log.read_text(errors="replace")
        raise DidNotStart(f"nobody listens at {where} ({self.process.poll()}):\n{said}")

    def context_switches(self) -> int:
        """How often it has gone to sleep, and so been woken, in all its threads."""
        return sum(
            int(line.split()[1])
            for status in Path(f"/proc/{self.process.pid}/task").glob("*/status")
            for line in status.read_text().splitlines()
            if line.startswith("voluntary_ctxt_switches")
        )

    def cpu_ms(self) -> float:
        """User and system time so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) * 1000 / os.sysconf("SC_CLK_TCK")

    def memory_kib(self, field: str) -> int:
        """`VmRSS`, what is resident, or the part of it that is not file pages, `RssAnon`."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        (line,) = [line for line in status.splitlines() if line.startswith(f"{field}:")]
        return int(line.split()[1])


@contextmanager
def running(path: Path, *argv: str) -> Iterator[Contender]:
    """The process that `argv` starts and whose socket will be `path`."""
    log = path.with_suffix(".log")
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    with log.open("wb") as file:
        process = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=env
        )
    try:
        yield Contender(process, path, log)
    finally:
        process.terminate()
        process.wait()


@contextmanager
def native(folder: Path) -> Iterator[Contender]:
    """A server with one member and no uplink."""
    with engine(folder, NATIVE) as contender:
        yield contender


@contextmanager
def engine(folder: Path, name: str) -> Iterator[Contender]:
    """The same with this engine, one of `engines`."""
    path = folder / f"{name}.sock"
    options = ("--socket-path", str(path), "--engine", name)
    with running(path, COMMAND, "serve", *options) as contender:
        yield contender


def engines() -> tuple[str, ...]:
    """The engines that there are here; the columns of a figure."""
    try:
        load()
    except LibraryError as error:
        print(f"no column {LIBVFIO_USER}: {error}", file=sys.stderr)
        return (NATIVE,)
    return (NATIVE, LIBVFIO_USER)


@contextmanager
def echo(folder: Path) -> Iterator[Contender]:
    path = folder / "echo.sock"
    with running(path, *ECHO_COMMAND, str(path)) as contender:
        yield contender
        path.unlink(missing_ok=True)


@contextmanager
def native_members(
    folder: Path, count: int, queue_pairs: int = 1
) -> Iterator[tuple[Contender, list[Path]]]:
    """A server with `count` members on one switch, and their sockets."""
    paths = [folder / f"vf{number}.sock" for number in range(count)]
    config = folder / "members.toml"
    members = "".join(
        f'[[owner.member]]\nsocket_path = "{path}"\nqueue_pairs = {queue_pairs}\n' for path in paths
    )
    config.write_text(f'[[owner]]\nuplink = "none"\n{members}')
    with running(paths[0], COMMAND, "serve", "--config", str(config)) as contender:
        yield contender, paths


@asynccontextmanager
async def session(contender: Contender, path: Path | None = None) -> AsyncIterator[Client]:
    """A client of the library, past VERSION."""
    sock = await contender.connect(path)
    async with connect_socket(sock) as client:
        yield client


@contextmanager
def blocking(client: Client) -> Iterator[socket.socket]:
    """The client's connection for blocking calls; meanwhile nothing may be awaited."""
    with socket.socket(fileno=os.dup(client.endpoint.fileno())) as sock:
        sock.setblocking(True)
        try:
            yield sock
        finally:
            sock.setblocking(False)


def time_round_trips(sock: socket.socket, message: bytes, count: int) -> list[float]:
    """Microseconds from sending `message` to having the answer, `count` times."""
    clock, send, receive = time.perf_counter_ns, sock.sendall, sock.recv
    times = []
    for _ in range(count):
        start = clock()
        send(message)
        receive(4096)
        times.append((clock() - start) / 1000)
    return times
