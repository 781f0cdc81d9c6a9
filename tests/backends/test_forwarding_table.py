"""The table's bounds, and that it forgets no sooner and remembers no longer than it says."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vfio_user_virtio.backends.software.forwarding_table import ForwardingTable


def make(max_entries: int = 4, max_per_place: int = 3) -> ForwardingTable[str]:
    return ForwardingTable(age=10.0, max_entries=max_entries, max_per_place=max_per_place)


def address(number: int) -> bytes:
    return number.to_bytes(6, "big")


def test_one_place_cannot_take_the_whole_table() -> None:
    table = make()
    for number in range(10):
        table.learn(0, address(number), "hostile", 0.0)
    assert len(table) == 3
    table.learn(0, address(99), "other", 0.0)
    assert table.look_up(0, address(99), 0.0) == "other"
    table.learn(0, address(98), "other", 0.0)
    assert table.look_up(0, address(98), 0.0) is None
    assert table.look_up(0, address(0), 0.0) == "hostile"


def test_old_entries_make_room() -> None:
    table = make()
    for number in range(3):
        table.learn(0, address(number), "a", 0.0)
    table.learn(0, address(0), "a", 5.0)
    table.learn(0, address(3), "a", 10.0)
    assert table.look_up(0, address(3), 10.0) is None
    table.learn(0, address(3), "a", 10.9)  # old ones are there, but it was swept just now
    assert table.look_up(0, address(3), 10.9) is None
    table.learn(0, address(3), "a", 11.0)
    assert table.look_up(0, address(3), 11.0) == "a"
    assert table.look_up(0, address(0), 15.0) == "a"
    assert table.look_up(0, address(0), 15.1) is None
    assert len(table) == 2


def test_an_address_that_moves_to_a_full_place_is_known_nowhere() -> None:
    table = make(max_entries=9)
    for number in range(3):
        table.learn(0, address(number), "full", 0.0)
    table.learn(0, address(9), "a", 0.0)
    table.learn(0, address(9), "full", 0.0)
    assert table.look_up(0, address(9), 0.0) is None
    assert len(table) == 3


def test_forget_and_clear() -> None:
    table = make()
    table.learn(0, address(1), "a", 0.0)
    table.learn(1, address(1), "b", 0.0)
    table.forget("a")
    table.forget("never seen")
    assert table.look_up(0, address(1), 0.0) is None
    assert table.look_up(1, address(1), 0.0) == "b"
    table.clear()
    assert len(table) == 0


@given(
    st.lists(
        st.tuples(st.integers(0, 1), st.integers(0, 9), st.sampled_from("abc"), st.floats(0, 4)),
        max_size=80,
    )
)
def test_against_a_dictionary(steps: list[tuple[int, int, str, float]]) -> None:
    """Whatever is answered is the last place that was seen, not too long ago; bounds hold."""
    table = make(6, 3)
    seen: dict[tuple[int, int], tuple[str, float]] = {}
    now = 0.0
    for vlan, number, place, pause in steps:
        now += pause
        table.learn(vlan, address(number), place, now)
        seen[vlan, number] = (place, now)
        assert len(table) <= 6
        answers = []
        for (known_vlan, known), (last_place, when) in seen.items():
            answer = table.look_up(known_vlan, address(known), now)
            if answer is not None:
                assert (answer, now - when <= 10.0) == (last_place, True)
                answers.append(answer)
        assert all(answers.count(each) <= 3 for each in "abc")
