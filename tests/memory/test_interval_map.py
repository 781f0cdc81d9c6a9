"""The interval map against a model that knows each unit of a small address space."""

from __future__ import annotations

import errno

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfio_user_virtio.errors import ClientError
from vfio_user_virtio.memory.interval_map import IntervalMap

U64_END = 1 << 64


@attrs.frozen
class Entry:
    start: int
    end: int


def filled(*ranges: tuple[int, int]) -> IntervalMap[Entry]:
    intervals: IntervalMap[Entry] = IntervalMap()
    for start, end in ranges:
        intervals.insert(Entry(start, end))
    return intervals


def test_find_knows_the_first_and_the_last_byte_of_an_entry() -> None:
    intervals = filled((10, 20), (20, 30), (40, U64_END))
    found = {at: intervals.find(at) for at in (0, 9, 10, 19, 20, 29, 30, 39, 40, U64_END - 1)}
    assert [at for at, entry in found.items() if entry is None] == [0, 9, 30, 39]
    assert found[19] == Entry(10, 20)
    assert found[20] == Entry(20, 30)
    assert found[U64_END - 1] == Entry(40, U64_END)
    assert len(intervals) == 3


@pytest.mark.parametrize(
    ("start", "end"), [(10, 20), (0, 11), (19, 25), (12, 13), (0, U64_END), (29, 31), (15, 25)]
)
def test_overlap_is_eexist_and_names_both_ranges(start: int, end: int) -> None:
    intervals = filled((10, 20), (25, 30))
    with pytest.raises(ClientError) as caught:
        intervals.insert(Entry(start, end))
    assert caught.value.errno == errno.EEXIST
    assert f"[{start:#x}, {end - 1:#x}]" in str(caught.value)
    assert "[0xa, 0x13]" in str(caught.value) or "[0x19, 0x1d]" in str(caught.value)
    assert list(intervals) == [Entry(10, 20), Entry(25, 30)]


def test_remove_inside_takes_whole_entries_only() -> None:
    intervals = filled((10, 20), (20, 30), (40, 50))
    assert intervals.remove_inside(30, 40) == []
    assert intervals.remove_inside(0, 10) == []
    assert intervals.remove_inside(50, U64_END) == []
    for start, end in ((0, 15), (11, 20), (15, 35), (25, 50), (12, 13), (0, 49)):
        with pytest.raises(ClientError) as caught:
            intervals.remove_inside(start, end)
        assert caught.value.errno == errno.EINVAL
        assert "split" in str(caught.value)
        assert len(intervals) == 3
    assert intervals.remove_inside(10, 30) == [Entry(10, 20), Entry(20, 30)]
    assert intervals.remove_inside(0, U64_END) == [Entry(40, 50)]
    assert list(intervals) == []


def test_empty() -> None:
    intervals = filled()
    assert intervals.find(0) is None
    assert intervals.remove_inside(0, U64_END) == []


RANGES = st.tuples(st.integers(0, 31), st.integers(1, 32)).map(lambda t: (t[0], t[0] + t[1]))


@given(st.lists(st.tuples(st.booleans(), RANGES), max_size=40))
def test_against_a_model(steps: list[tuple[bool, tuple[int, int]]]) -> None:
    intervals = filled()
    model: dict[int, Entry] = {}
    for insert, (start, end) in steps:
        units = set(range(start, end))
        inside = {entry for entry in model.values() if start <= entry.start and entry.end <= end}
        touched = {model[unit] for unit in units if unit in model}
        entry = Entry(start, end)
        if touched if insert else touched != inside:
            with pytest.raises(ClientError) as caught:
                intervals.insert(entry) if insert else intervals.remove_inside(start, end)
            assert caught.value.errno == (errno.EEXIST if insert else errno.EINVAL)
        elif insert:
            intervals.insert(entry)
            model.update(dict.fromkeys(units, entry))
        else:
            assert intervals.remove_inside(start, end) == sorted(inside, key=lambda e: e.start)
            model = {unit: entry for unit, entry in model.items() if entry not in inside}
        assert {unit: intervals.find(unit) for unit in range(64)} == {
            unit: model.get(unit) for unit in range(64)
        }
        assert intervals.starts == sorted({entry.start for entry in model.values()})
        assert [entry.start for entry in intervals.entries] == intervals.starts
