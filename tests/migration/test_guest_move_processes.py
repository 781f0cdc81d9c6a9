"""A guest under load that moves between two daemons, each a process of its own."""

from __future__ import annotations

import contextlib
import struct
from typing import TYPE_CHECKING

import pytest

from tests.backends.member_rig import MAC_A, MAC_B
from tests.migration.guest_move_network import Host, flow_and_number
from tests.migration.guest_move_rig import places
from tests.server.server_process import served, short_folder
from tests.testbed.engines import LIBVFIO_USER, NATIVE
from vfio_user_virtio.protocol.migration import MigrationFlags

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_PACKET = 6
_TO_THE_GUEST = 2


def captured(path: Path) -> Iterator[tuple[int, int]]:
    """Flow and number of each frame that a device was given, from the capture of its member."""
    data = path.read_bytes()
    position = 0
    while position < len(data):
        kind, size = struct.unpack_from("<II", data, position)
        if kind == _PACKET:
            (length,) = struct.unpack_from("<I", data, position + 20)
            (flags,) = struct.unpack_from("<I", data, position + size - 12)
            found = flow_and_number(data[position + 28 : position + 28 + length])
            if found is not None and flags == _TO_THE_GUEST:
                yield found
        position += size


async def moves(engines: tuple[str, str], pairs: int, p2p: bool, precopy: bool) -> None:
    """Three moves under load between daemons a and b, of these engines."""
    with short_folder() as folder, contextlib.ExitStack() as stack:
        host = stack.enter_context(Host(folder))
        servers = []
        for name, mac, engine in zip("ab", (MAC_A, MAC_B), engines, strict=True):
            options = [
                *("--socket-path", folder / f"{name}.sock", "--mac", mac.hex(":")),
                *("--uplink", f"datagram:{host.address_of(name)},{host.address}"),
                *("--queue-pairs", str(pairs), "--pcap", folder / f"{name}.pcap"),
                *("--engine", engine),
                *(() if p2p else ("--no-p2p",)),
            ]
            servers.append(stack.enter_context(served(*options)))
        driver: dict[str, object] = {"max_pairs": pairs, "rx_buffers": 32}
        async with places(host, folder, 8 << 20, {}, driver) as made:
            await made.start()
            for place, engine in zip("bab", (engines * 2)[1:], strict=True):
                migration = await made.move(precopy=precopy, rounds=3)
                assert (MigrationFlags.P2P in migration.target_options) == (
                    p2p and engine == NATIVE
                )
                assert migration.precopy == precopy
                await made.traffic.goes_on(place)
            await made.finish()
            assert host.announced == ["b", "a", "b"]
        for server in servers:
            code, log = server.stop()
            assert code == 0, log
            assert "broke a rule" not in log
            assert "Traceback" not in log
        given = [found for name in "ab" for found in captured(folder / f"{name}.pcap")]
        assert sorted(given) == sorted(made.traffic.seen)


@pytest.mark.slow
@pytest.mark.parametrize("precopy", [True, False], ids=["precopy", "stop-copy"])
@pytest.mark.parametrize("p2p", [True, False], ids=["p2p", "no-p2p"])
@pytest.mark.parametrize("pairs", [1, 8])
async def test_between_two_daemons(pairs: int, p2p: bool, precopy: bool) -> None:
    await moves((NATIVE, NATIVE), pairs, p2p, precopy)


@pytest.mark.slow
@pytest.mark.parametrize("pairs", [1, 8])
@pytest.mark.parametrize(
    "engines",
    [(LIBVFIO_USER, LIBVFIO_USER), (NATIVE, LIBVFIO_USER), (LIBVFIO_USER, NATIVE)],
    ids="-to-".join,
)
@pytest.mark.usefixtures("library")
async def test_between_engines(engines: tuple[str, str], pairs: int) -> None:
    await moves(engines, pairs, p2p=True, precopy=True)
