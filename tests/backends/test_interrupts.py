"""SET_IRQS and delivery, on real eventfds; the sequences against a model of what is armed."""

from __future__ import annotations

import errno
import gc
import os
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vfio_user_virtio.backends.software.interrupts import Interrupts, InterruptStatistics
from vfio_user_virtio.device import IrqAction, IrqFlags, IrqInfo, IrqRequest, VfioIrq
from vfio_user_virtio.errors import ClientError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

VECTORS = 5
COUNTS = {VfioIrq.INTX: 1, VfioIrq.MSI: 0, VfioIrq.MSIX: VECTORS, VfioIrq.ERR: 1, VfioIrq.REQ: 1}
TRIGGER, MASK, UNMASK = IrqAction.TRIGGER, IrqAction.MASK, IrqAction.UNMASK


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


class Client:
    """The client's side: sends copies of eventfds, and reads what it was told."""

    def __init__(self) -> None:
        self.interrupts = Interrupts(VECTORS)
        self.before = open_fds()
        self.held: list[int] = []

    def eventfds(self, count: int = 1) -> tuple[int, ...]:
        """New eventfds to send; ours stay in `held`."""
        new = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(count)]
        self.held += new
        return tuple(os.dup(fd) for fd in new)

    def arm(self, index: int, start: int = 0, count: int = 1) -> None:
        self.set_irqs(index, start, count, eventfds=self.eventfds(count))

    def set_irqs(
        self,
        index: int,
        start: int = 0,
        count: int = 0,
        action: IrqAction = TRIGGER,
        *,
        eventfds: tuple[int, ...] | None = None,
        bools: tuple[bool, ...] | None = None,
    ) -> None:
        self.interrupts.set_irqs(IrqRequest(index, start, count, action, eventfds, bools))

    def told(self) -> list[int]:
        """How often each eventfd held was signalled since last asked."""
        counts = []
        for fd in self.held:
            try:
                counts.append(os.eventfd_read(fd))
            except BlockingIOError:
                counts.append(0)
        return counts

    def armed(self) -> int:
        """How many fds the function holds."""
        return open_fds() - self.before - len(self.held)

    def close(self) -> None:
        self.interrupts.close()
        assert self.armed() == 0
        for fd in self.held:
            os.close(fd)
        assert open_fds() == self.before


@pytest.fixture(scope="module", autouse=True)
def settled() -> None:
    """Fds are counted here, and none may belong to what other tests left to be collected."""
    gc.collect()


@pytest.fixture
def client() -> Iterator[Client]:
    client = Client()
    yield client
    client.close()


def test_info() -> None:
    interrupts = Interrupts(VECTORS)
    assert interrupts.info(VfioIrq.INTX) == IrqInfo(
        1, IrqFlags.EVENTFD | IrqFlags.MASKABLE | IrqFlags.AUTOMASKED
    )
    assert interrupts.info(VfioIrq.MSI) == IrqInfo(0, IrqFlags(0))
    assert interrupts.info(VfioIrq.MSIX) == IrqInfo(VECTORS, IrqFlags.EVENTFD)
    assert interrupts.info(VfioIrq.ERR) == IrqInfo(1, IrqFlags.EVENTFD)
    assert interrupts.info(VfioIrq.REQ) == IrqInfo(1, IrqFlags.EVENTFD)
    assert interrupts.info(5) == IrqInfo(0, IrqFlags(0))


def test_an_armed_vector_is_signalled_alone(client: Client) -> None:
    client.arm(VfioIrq.MSIX, 1, 3)
    client.interrupts.trigger(2)
    client.interrupts.trigger(2)
    client.interrupts.trigger(3)
    assert client.told() == [0, 2, 1]
    assert client.interrupts.statistics() == InterruptStatistics(signalled=3, pended=0)


@pytest.mark.parametrize("vector", [VECTORS, 2048, 0xFFFF])
def test_a_vector_that_is_not_there_is_ignored(client: Client, vector: int) -> None:
    client.arm(VfioIrq.MSIX, 0, VECTORS)
    client.interrupts.trigger(vector)
    assert client.told() == [0] * VECTORS
    assert client.interrupts.pending.read(0, 8) == bytes(8)


def test_a_vector_without_eventfd_pends_and_arming_delivers_once(client: Client) -> None:
    client.interrupts.trigger(3)
    client.interrupts.trigger(3)
    assert client.interrupts.pending.read(0, 8) == b"\x08" + bytes(7)
    assert client.interrupts.statistics() == InterruptStatistics(signalled=0, pended=2)
    client.arm(VfioIrq.MSIX, 0, VECTORS)
    assert client.told() == [0, 0, 0, 1, 0]
    assert client.interrupts.pending.read(0, 8) == bytes(8)


def test_qemus_way_of_enabling_msix(client: Client) -> None:
    client.arm(VfioIrq.INTX)
    client.set_irqs(VfioIrq.INTX)
    assert client.armed() == 0
    client.set_irqs(VfioIrq.MSIX, 0, 1, eventfds=())
    for vector in range(VECTORS):
        client.arm(VfioIrq.MSIX, vector)
        client.interrupts.trigger(vector)
    assert client.told() == [0] + [1] * VECTORS
    client.set_irqs(VfioIrq.MSIX)
    assert client.armed() == 0
    client.set_irqs(VfioIrq.MSI)


def test_replacing_an_eventfd_closes_the_old_one(client: Client) -> None:
    client.arm(VfioIrq.MSIX, 0)
    for index in (VfioIrq.INTX, VfioIrq.MSIX, VfioIrq.ERR, VfioIrq.REQ):
        client.arm(index)
        client.arm(index)
    assert client.armed() == 4
    client.interrupts.trigger(0)
    assert client.told() == [0] * 4 + [1] + [0] * 4


def test_deassigning_takes_only_its_range(client: Client) -> None:
    client.arm(VfioIrq.MSIX, 0, VECTORS)
    client.set_irqs(VfioIrq.MSIX, 1, 2, eventfds=())
    assert client.armed() == VECTORS - 2
    for vector in range(VECTORS):
        client.interrupts.trigger(vector)
    assert client.told() == [1, 0, 0, 1, 1]
    assert client.interrupts.pending.read(0, 1) == b"\x06"


def test_switching_off_keeps_what_is_pending_and_a_reset_does_not(client: Client) -> None:
    client.interrupts.trigger(1)
    client.set_irqs(VfioIrq.MSIX)
    assert client.interrupts.pending.read(0, 1) == b"\x02"
    client.arm(VfioIrq.MSIX, 0)
    client.interrupts.reset()
    assert client.interrupts.pending.read(0, 1) == b"\x00"
    client.interrupts.trigger(0)
    assert client.told() == [1]


def test_injection(client: Client) -> None:
    client.arm(VfioIrq.MSIX, 0, 4)
    client.set_irqs(VfioIrq.MSIX, 1, 2)
    client.set_irqs(VfioIrq.MSIX, 2, 3, bools=(False, True, True))
    client.set_irqs(VfioIrq.ERR, 0, 1)
    assert client.told() == [0, 1, 1, 1]
    assert client.interrupts.pending.read(0, 8) == bytes(8)


def test_intx_masks_itself_until_unmasked(client: Client) -> None:
    client.arm(VfioIrq.INTX)
    client.interrupts.set_intx_level(True)
    client.interrupts.set_intx_level(True)
    client.interrupts.set_intx_level(False)
    client.interrupts.set_intx_level(True)
    assert client.told() == [1]
    client.set_irqs(VfioIrq.INTX, 0, 1, UNMASK)
    assert client.told() == [1]
    client.interrupts.set_intx_level(False)
    client.set_irqs(VfioIrq.INTX, 0, 1, UNMASK)
    assert client.told() == [0]
    client.interrupts.set_intx_level(True)
    assert client.told() == [1]


def test_intx_masked_by_the_client(client: Client) -> None:
    client.arm(VfioIrq.INTX)
    client.set_irqs(VfioIrq.INTX, 0, 1, MASK)
    client.interrupts.set_intx_level(True)
    client.set_irqs(VfioIrq.INTX, 0, 1, UNMASK, bools=(False,))
    client.set_irqs(VfioIrq.INTX, 0, 0, UNMASK)
    assert client.told() == [0]
    client.set_irqs(VfioIrq.INTX, 0, 1, UNMASK, bools=(True,))
    assert client.told() == [1]


def test_intx_asserted_before_it_is_armed(client: Client) -> None:
    client.interrupts.set_intx_level(True)
    client.arm(VfioIrq.INTX)
    assert client.told() == [1]
    client.arm(VfioIrq.INTX)
    assert client.told() == [0, 0]
    client.set_irqs(VfioIrq.INTX)
    client.arm(VfioIrq.INTX)
    assert client.told() == [0, 0, 1]


def test_intx_disable(client: Client) -> None:
    client.arm(VfioIrq.INTX)
    client.interrupts.set_intx_disabled(True)
    client.interrupts.set_intx_level(True)
    assert client.told() == [0]
    client.interrupts.set_intx_disabled(False)
    assert client.told() == [1]
    client.interrupts.set_intx_disabled(True)
    client.set_irqs(VfioIrq.INTX, 0, 1, UNMASK)
    client.interrupts.reset()
    client.interrupts.set_intx_disabled(False)
    assert client.told() == [0]
    client.interrupts.set_intx_level(True)
    assert client.told() == [1]


def test_closing_gives_everything_back_and_a_new_session_can_follow(client: Client) -> None:
    for index in (VfioIrq.INTX, VfioIrq.MSIX, VfioIrq.ERR, VfioIrq.REQ):
        client.arm(index)
    client.interrupts.set_intx_level(True)
    assert client.told() == [1, 0, 0, 0]
    client.interrupts.close()
    assert client.armed() == 0
    client.arm(VfioIrq.INTX)
    assert client.told() == [0, 0, 0, 0, 1]


@pytest.mark.parametrize(
    ("index", "start", "count"),
    [
        (VfioIrq.MSIX, 0, VECTORS + 1),
        (VfioIrq.MSIX, VECTORS, 1),
        (VfioIrq.MSIX, VECTORS + 1, 0),
        (VfioIrq.MSIX, 0, 0xFFFF_FFFF),
        (VfioIrq.MSIX, 0xFFFF_FFFF, 0xFFFF_FFFF),
        (VfioIrq.INTX, 0, 2),
        (VfioIrq.MSI, 0, 1),
        (5, 0, 1),
        (5, 0, 0),
        (0xFFFF_FFFF, 0, 1),
    ],
)
@pytest.mark.parametrize("kind", ["none", "bools", "eventfds", "deassign"])
def test_ranges_that_are_not_there_are_refused(
    client: Client, index: int, start: int, count: int, kind: str
) -> None:
    few = min(count, 8)
    eventfds: tuple[int, ...] | None = None
    if kind == "eventfds":
        eventfds = client.eventfds(few)
    elif kind == "deassign":
        eventfds = ()
    bools = (True,) * few if kind == "bools" else None
    with pytest.raises(ClientError) as caught:
        client.set_irqs(index, start, count, eventfds=eventfds, bools=bools)
    assert caught.value.errno == errno.EINVAL
    assert client.armed() == 0


@pytest.mark.parametrize(
    ("refused", "number"),
    [
        (lambda client: client.set_irqs(VfioIrq.MSIX, 0, 1, MASK), errno.ENOTTY),
        (lambda client: client.set_irqs(VfioIrq.ERR, 0, 1, UNMASK), errno.ENOTTY),
        (lambda client: client.set_irqs(VfioIrq.MSI, 0, 0, MASK), errno.ENOTTY),
        (
            lambda client: client.set_irqs(VfioIrq.INTX, 0, 1, MASK, eventfds=client.eventfds()),
            errno.EINVAL,
        ),
        (lambda client: client.set_irqs(VfioIrq.INTX, 0, 1, UNMASK, eventfds=()), errno.EINVAL),
        (
            lambda client: client.set_irqs(VfioIrq.MSIX, 0, 3, eventfds=client.eventfds(2)),
            errno.EINVAL,
        ),
        (
            lambda client: client.set_irqs(VfioIrq.MSIX, 0, 0, eventfds=client.eventfds(1)),
            errno.EINVAL,
        ),
        (lambda client: client.set_irqs(VfioIrq.MSIX, 0, 2, bools=(True,)), errno.EINVAL),
        (lambda client: client.set_irqs(VfioIrq.MSIX, 0, 0, bools=(True,)), errno.EINVAL),
    ],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(
    client: Client, refused: Callable[[Client], None], number: int
) -> None:
    client.arm(VfioIrq.MSIX, 0, VECTORS)
    client.arm(VfioIrq.INTX)
    with pytest.raises(ClientError) as caught:
        refused(client)
    assert caught.value.errno == number
    assert client.armed() == VECTORS + 1
    for vector in range(VECTORS):
        client.interrupts.trigger(vector)
    client.interrupts.set_intx_level(True)
    assert client.told()[: VECTORS + 1] == [1] * (VECTORS + 1)


@pytest.mark.parametrize("position", [0, 1, 2])
def test_one_fd_that_is_no_eventfd_spoils_the_request(client: Client, position: int) -> None:
    client.arm(VfioIrq.MSIX, 0, 3)
    fds = list(client.eventfds(2))
    fds.insert(position, os.memfd_create("no eventfd"))
    with pytest.raises(ClientError, match="eventfd") as caught:
        client.set_irqs(VfioIrq.MSIX, 0, 3, eventfds=tuple(fds))
    assert caught.value.errno == errno.EINVAL
    assert client.armed() == 3
    for vector in range(3):
        client.interrupts.trigger(vector)
    assert client.told() == [1, 1, 1, 0, 0]


@pytest.mark.parametrize("index", [VfioIrq.INTX, VfioIrq.MSIX, VfioIrq.ERR])
def test_a_full_counter_holds_nobody_up(client: Client, index: VfioIrq) -> None:
    client.arm(index)
    fd = client.held[0]
    os.eventfd_write(fd, (1 << 64) - 2)
    os.set_blocking(fd, True)
    for _ in range(2):
        client.interrupts.trigger(0)
        client.interrupts.set_intx_level(True)
        client.set_irqs(index, 0, 1)
    assert os.eventfd_read(fd) >= (1 << 64) - 2


class Model:
    """What should be armed and told, in the simplest words."""

    def __init__(self) -> None:
        self.armed: dict[tuple[int, int], int] = {}
        self.pending: set[int] = set()
        self.told: list[int] = []
        self.level = self.masked = self.disabled = False

    def tell(self, index: int, subindex: int) -> None:
        if (index, subindex) in self.armed:
            self.told[self.armed[index, subindex]] += 1

    def settle(self) -> None:
        if self.level and not self.masked and not self.disabled and (0, 0) in self.armed:
            self.masked = True
            self.tell(0, 0)

    def arm(self, index: int, subindex: int) -> None:
        self.told.append(0)
        self.armed[index, subindex] = len(self.told) - 1
        if index == VfioIrq.MSIX and subindex in self.pending:
            self.pending.remove(subindex)
            self.tell(index, subindex)

    def disarm(self, index: int, subindex: int) -> None:
        self.armed.pop((index, subindex), None)
        if index == VfioIrq.INTX:
            self.masked = False

    def trigger(self, vector: int) -> None:
        if (VfioIrq.MSIX, vector) in self.armed:
            self.tell(VfioIrq.MSIX, vector)
        elif vector < VECTORS:
            self.pending.add(vector)


ranges = st.tuples(
    st.sampled_from([index for index in VfioIrq if COUNTS[index]]),
    st.integers(0, 9),
    st.integers(1, 9),
).map(lambda r: (r[0], r[1] % COUNTS[r[0]], 1 + (r[2] - 1) % (COUNTS[r[0]] - r[1] % COUNTS[r[0]])))
steps = st.one_of(
    st.tuples(st.sampled_from(["arm", "deassign", "inject", "bools", "spoilt", "short"]), ranges),
    st.tuples(st.just("disable"), st.sampled_from(list(VfioIrq))),
    st.tuples(st.sampled_from(["mask", "unmask"]), st.booleans()),
    st.tuples(st.sampled_from(["level", "intx disable"]), st.booleans()),
    st.tuples(st.just("trigger"), st.integers(0, VECTORS)),
    st.tuples(st.just("reset"), st.none()),
)


def apply(client: Client, model: Model, step: str, argument: object) -> None:
    """Do one step on both."""
    interrupts = client.interrupts
    match step, argument:
        case "arm", (int(index), int(start), int(count)):
            client.arm(index, start, count)
            for subindex in range(start, start + count):
                model.arm(index, subindex)
        case "deassign", (int(index), int(start), int(count)):
            client.set_irqs(index, start, count, eventfds=())
            for subindex in range(start, start + count):
                model.disarm(index, subindex)
        case "inject", (int(index), int(start), int(count)):
            client.set_irqs(index, start, count)
            for subindex in range(start, start + count):
                model.tell(index, subindex)
        case "bools", (int(index), int(start), int(count)):
            chosen = tuple(subindex % 2 == 0 for subindex in range(start, start + count))
            client.set_irqs(index, start, count, bools=chosen)
            for subindex in range(start, start + count):
                if subindex % 2 == 0:
                    model.tell(index, subindex)
        case (("spoilt" | "short"), (int(index), int(start), int(count))):
            fds = client.eventfds(count)
            model.told += [0] * count
            if step == "spoilt":
                os.close(fds[-1])
                fds = (*fds[:-1], os.memfd_create("no eventfd"))
            else:
                fds = (*fds, *client.eventfds(1))
                model.told.append(0)
            with pytest.raises(ClientError):
                client.set_irqs(index, start, count, eventfds=fds)
        case "disable", VfioIrq() as index:
            client.set_irqs(index)
            for subindex in range(COUNTS[index]):
                model.disarm(index, subindex)
        case (("mask" | "unmask"), bool(chosen_one)):
            action = MASK if step == "mask" else UNMASK
            client.set_irqs(VfioIrq.INTX, 0, 1, action, bools=(chosen_one,))
            if chosen_one:
                model.masked = step == "mask"
        case "level", bool(level):
            interrupts.set_intx_level(level)
            model.level = level
        case "intx disable", bool(disabled):
            interrupts.set_intx_disabled(disabled)
            model.disabled = disabled
        case "trigger", int(vector):
            interrupts.trigger(vector)
            model.trigger(vector)
        case "reset", None:
            interrupts.reset()
            model.level = False
            model.pending.clear()
        case _:
            raise AssertionError(step)


@settings(deadline=None)
@given(st.lists(steps, max_size=25))
def test_any_sequence_does_what_the_model_does(sequence: list[tuple[str, object]]) -> None:
    client, model = Client(), Model()
    for step, argument in sequence:
        apply(client, model, step, argument)
        model.settle()
        assert client.told() == model.told
        model.told = [0] * len(model.told)
        assert client.armed() == len(model.armed)
        pending = sum(1 << vector for vector in model.pending)
        assert client.interrupts.pending.read(0, 8) == pending.to_bytes(8, "little")
    client.close()
