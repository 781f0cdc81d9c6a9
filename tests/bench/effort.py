"""How much is measured: the same benchmarks, long enough to believe, quick, or only to try them."""

from __future__ import annotations

from typing import Final

import attrs


@attrs.frozen
class Effort:
    """Blocks alternate between the contenders; all counts are per contender.

    `round_trips` per block of register accesses, `batches` of packets, `starts` of each server,
    `idle_seconds` watched, `members` beside the first, `maps` numbers of DMA mappings, `pairs` of
    samples of each kind of guest traffic: transfers of `seconds`, blocks of `pings`.  Migrations:
    `modelled` on a slow device, `moves` of a device on a quick one, `streams` of `stream_mib` MiB,
    and so many members `at_once`; `guest_moves` of whole guests with each load.  A physical
    function: the `ways` into VFIO, `vf_packets` and administration `commands` per block, sizes of a
    guest whose memory is mapped (`guest_mib`).
    `pinned`: see `guest_traffic`.
    """

    name: str
    blocks: int
    round_trips: int
    batches: int
    starts: int
    idle_seconds: float
    members: int
    maps: tuple[int, ...]
    pairs: int
    seconds: int
    pings: int
    modelled: int
    guest_moves: int
    moves: int
    streams: int
    stream_mib: int
    at_once: tuple[int, ...]
    ways: tuple[str, ...]
    vf_packets: int
    commands: int
    guest_mib: tuple[int, ...]
    pinned: bool = False


FULL: Final = Effort(
    name="full",
    blocks=20,
    round_trips=1_000,
    batches=200,
    starts=10,
    idle_seconds=5,
    members=100,
    maps=(1, 1_000, 65_535),
    pairs=5,
    seconds=2,
    pings=40,
    modelled=5,
    guest_moves=4,
    moves=200,
    streams=6,
    stream_mib=63,
    at_once=(1, 8, 64, 255),
    ways=("cdev", "group"),
    vf_packets=32,
    commands=200,
    guest_mib=(1024, 8192),
)
QUICK: Final = attrs.evolve(
    FULL,
    name="quick",
    blocks=5,
    batches=50,
    starts=3,
    idle_seconds=2,
    members=20,
    pairs=1,
    pings=20,
    modelled=2,
    guest_moves=2,
    moves=50,
    streams=3,
    at_once=(1, 8, 64),
    ways=("cdev",),
    guest_mib=(256,),
)
TINY: Final = Effort(
    name="tiny",
    blocks=2,
    round_trips=20,
    batches=2,
    starts=1,
    idle_seconds=0.1,
    members=2,
    maps=(1, 20),
    pairs=1,
    seconds=1,
    pings=3,
    modelled=1,
    guest_moves=1,
    moves=2,
    streams=1,
    stream_mib=2,
    at_once=(1, 3),
    ways=("cdev",),
    vf_packets=4,
    commands=20,
    guest_mib=(16,),
)
"""Proves that a benchmark works; its figures mean nothing."""
