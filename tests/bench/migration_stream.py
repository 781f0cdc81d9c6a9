"""How fast a large image goes into and out of a server, against a plain copy.

A member has as many MiB of parts that no standard defines, the largest image that the bounds let
pass.  In this process the library's client has one request in flight, as `Migration` has.

- `out`: MIG_DATA_READ until no more is there; each piece is looked at no further
- `by`: MIG_DATA_WRITE of a record that the target skips, so nothing is kept
- `in`: MIG_DATA_WRITE of an image, up to the last of it but one: the target has to keep it
- `set`: the last of it, and its DEV_PARTS_SET: the time that the software owner takes

The peer is `plain_copy.py` and a loop of blocking calls here, 1 MiB at a time, on a socket of the
same kind: into a buffer that is used again (`out`, `by`), or into as much new memory (`in`).
"""

from __future__ import annotations

import itertools
import sys
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tests.bench.contenders import running, session
from tests.bench.figures import NATIVE, Better, Figure, at_least
from tests.bench.migration_sides import model_side, set_state, two_folders
from tests.bench.plain_copy import CHUNK, send
from vfio_user_virtio.limits import MIB
from vfio_user_virtio.migration.stream import OPTIONAL, RecordHeader, encode_record_header
from vfio_user_virtio.protocol.migration import MigrationState

if TYPE_CHECKING:
    import socket

    from tests.bench.effort import Effort
    from tests.bench.figures import Publish
    from vfio_user_virtio.transport.client import Client

PLAIN: Final = "plain copy"
PLAIN_COMMAND: Final = (sys.executable, str(Path(__file__).with_name("plain_copy.py")))
AIM: Final = at_least(0.7, of_ratio=True)
UNKNOWN_TAG: Final = 0x7F000000


async def measure(effort: Effort, publish: Publish) -> None:
    size = effort.stream_mib * MIB
    memory = memoryview(b"x" * size)  # zeros would be one page of memory, over and over
    figures: dict[str, dict[str, list[float]]] = {
        name: {NATIVE: [], PLAIN: []} for name in ("out", "by", "in")
    }
    setting: list[float] = []
    async with AsyncExitStack() as stack:
        a, b = stack.enter_context(two_folders())
        sides = stack.enter_context(model_side(a, bulk=size)), stack.enter_context(model_side(b))
        source, target = [await stack.enter_async_context(session(side.server)) for side in sides]
        plain = stack.enter_context(
            running(a / "plain.sock", *PLAIN_COMMAND, str(a / "plain.sock"), str(size))
        )
        sock = stack.enter_context(await plain.connect())
        for sample in range(-1, effort.streams):
            stream = await save(source)
            ours = {"out": await read(source), "by": await skipped(target, memory)}
            ours["in"], last = await write(target, stream)
            theirs = plain_copies(sock, memory)
            if sample >= 0:
                setting.append(last * 1000)
                for name, columns in figures.items():
                    columns[NATIVE].append(effort.stream_mib / ours[name])
                    columns[PLAIN].append(effort.stream_mib / theirs[name])
    for name, columns in figures.items():
        what = f"stream of {effort.stream_mib} MiB, {name}"
        publish(Figure(what, "MiB/s", Better.MORE, columns, PLAIN, AIM))
    what = f"stream of {effort.stream_mib} MiB, set"
    publish(Figure(what, "ms", Better.LESS, {NATIVE: setting}))


async def save(source: Client) -> list[bytes]:
    """The stream, in pieces to write."""
    await set_state(source, MigrationState.STOP_COPY)
    pieces: list[bytes] = []
    while not pieces or len(pieces[-1]) == CHUNK:
        pieces.append(bytes(await source.migration_read(CHUNK)))
    await set_state(source, MigrationState.RUNNING)
    return pieces


async def read(source: Client) -> float:
    """Seconds to read all of it."""
    await set_state(source, MigrationState.STOP_COPY)
    begin = time.perf_counter()
    while len(await source.migration_read(CHUNK)) == CHUNK:
        pass
    taken = time.perf_counter() - begin
    await set_state(source, MigrationState.RUNNING)
    return taken


async def skipped(target: Client, memory: memoryview) -> float:
    """Seconds to write all of `memory`, for which the target has no use."""
    header = encode_record_header(RecordHeader(len(memory), OPTIONAL, UNKNOWN_TAG))
    await set_state(target, MigrationState.RESUMING)
    begin = time.perf_counter()
    await target.migration_write(header)
    for start in range(0, len(memory), CHUNK):
        await target.migration_write(memory[start : start + CHUNK])
    taken = time.perf_counter() - begin
    await target.reset()
    return taken


async def write(target: Client, stream: list[bytes]) -> tuple[float, float]:
    """Seconds that the image took but for its last piece, and that the rest took."""
    await set_state(target, MigrationState.RESUMING)
    begin = time.perf_counter()
    for piece in stream[:-1]:
        await target.migration_write(piece)
    middle = time.perf_counter()
    await target.migration_write(stream[-1])
    end = time.perf_counter()
    await set_state(target, MigrationState.STOP)
    await set_state(target, MigrationState.RUNNING)
    return middle - begin, end - middle


def plain_copies(sock: socket.socket, memory: memoryview) -> dict[str, float]:
    """Seconds of the peer's copies."""
    buffer = memoryview(bytearray(CHUNK))
    times = [time.perf_counter()]
    sock.sendall(b"r")
    left = len(memory)
    while left:
        left -= sock.recv_into(buffer[: min(left, CHUNK)])
    for wish in (b"s", b"w"):
        times.append(time.perf_counter())
        sock.sendall(wish)
        send(sock, memory)
        sock.recv(1)
    times.append(time.perf_counter())
    seconds = [later - sooner for sooner, later in itertools.pairwise(times)]
    return dict(zip(("out", "by", "in"), seconds, strict=True))
