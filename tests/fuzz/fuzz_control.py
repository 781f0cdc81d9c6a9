"""Any control commands: each answers OK or ERR, ERR changes nothing, and the state stays sound.

That is: `execute_untrusted` never raises; a command that it refuses leaves the device's state as it
was and calls for nothing; and whatever it accepts, queue pairs, VLANs, addresses, filter tables and
offloads stay within what was negotiated and within the limits.

Run it with ``python -m tests.fuzz.fuzz_control -max_total_time=60`` (atheris, libFuzzer's options);
the tests run `one_input` on hypothesis' bytes.

Input: the u64 feature word, then commands, each with a u16 length before it.
"""

from __future__ import annotations

import copy
import importlib
import sys
from typing import Final

from vfio_user_virtio import limits
from vfio_user_virtio.virtio.net_control import (
    ERR,
    GUEST_OFFLOADS,
    OK,
    Change,
    NetState,
    execute_untrusted,
)
from vfio_user_virtio.virtio.rx_filter import MAX_VLAN, FilterState

MAC: Final = bytes.fromhex("020000000001")
MAX_QUEUE_PAIRS: Final = 4


def check_sound(state: NetState, features: int) -> None:
    assert state.features == features
    assert state.max_queue_pairs == MAX_QUEUE_PAIRS
    assert 1 <= state.queue_pairs <= MAX_QUEUE_PAIRS
    assert state.guest_offloads & ~(features & GUEST_OFFLOADS) == 0
    rules = state.filter
    assert len(rules.mac) == 6
    assert all(0 <= vlan <= MAX_VLAN for vlan in rules.vlans)
    for table in (rules.unicast, rules.multicast):
        assert len(table) <= limits.MAX_MAC_TABLE
        assert all(len(address) == 6 for address in table)


def one_input(data: bytes) -> None:
    """One run of the fuzz target.  AssertionError or any other exception is a finding."""
    features = int.from_bytes(data[:8], "little")
    state = NetState(FilterState(MAC), features=features, max_queue_pairs=MAX_QUEUE_PAIRS)
    state.announce = True
    position = 8
    while position < len(data):
        size = int.from_bytes(data[position : position + 2], "little")
        command = data[position + 2 : position + 2 + size]
        position += 2 + size
        before = copy.deepcopy(state)
        answer, change = execute_untrusted(state, command)
        assert answer in (OK, ERR)
        if answer == ERR:
            assert change == Change.NOTHING, "a refusal calls for nothing"
            assert state == before, "a refusal changes nothing"
        check_sound(state, features)


def main() -> None:
    atheris = importlib.import_module("atheris")  # has no types, and is not there on Python 3.14
    atheris.instrument_all()
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
