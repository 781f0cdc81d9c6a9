from __future__ import annotations

import errno
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfio_user_virtio.device import IrqAction, IrqFlags, IrqInfo, IrqRequest, VfioIrq
from vfio_user_virtio.errors import ClientError, ConnectionLost
from vfio_user_virtio.protocol.irq import (
    check_irq_range,
    decode_irq_info_reply_untrusted,
    decode_irq_info_request_untrusted,
    decode_set_irqs_request_untrusted,
    encode_irq_info_reply,
    encode_irq_info_request,
    encode_set_irqs_request,
)

u32 = st.integers(0, (1 << 32) - 1)


@given(u32, st.integers(0, 15), u32)
def test_info_round_trip(index: int, flags: int, count: int) -> None:
    assert decode_irq_info_request_untrusted(encode_irq_info_request(index)) == index
    info = IrqInfo(count, IrqFlags(flags))
    assert decode_irq_info_reply_untrusted(encode_irq_info_reply(index, info), index) == info


@pytest.mark.parametrize("payload", [b"", bytes(15), struct.pack("<IIII", 15, 0, 0, 0)])
def test_bad_info_request(payload: bytes) -> None:
    with pytest.raises(ClientError, match="DEVICE_GET_IRQ_INFO has") as caught:
        decode_irq_info_request_untrusted(payload)
    assert caught.value.errno == errno.EINVAL


def test_bad_info_reply() -> None:
    with pytest.raises(ConnectionLost, match="payload of 15 bytes"):
        decode_irq_info_reply_untrusted(bytes(15), 0)
    with pytest.raises(ConnectionLost, match="index 2 is about index 0"):
        decode_irq_info_reply_untrusted(bytes(16), 2)


QEMU_MESSAGES = [
    (0x24, 0, 1, [7], IrqRequest(2, 0, 1, IrqAction.TRIGGER, eventfds=(7,))),
    (0x24, 3, 2, [7, 8], IrqRequest(2, 3, 2, IrqAction.TRIGGER, eventfds=(7, 8))),
    (0x24, 0, 4, [], IrqRequest(2, 0, 4, IrqAction.TRIGGER, eventfds=())),
    (0x21, 0, 0, [], IrqRequest(2, 0, 0, IrqAction.TRIGGER)),
    (0x11, 0, 1, [], IrqRequest(2, 0, 1, IrqAction.UNMASK)),
]


@pytest.mark.parametrize(("flags", "start", "count", "fds", "meant"), QEMU_MESSAGES)
def test_what_qemu_sends(
    flags: int, start: int, count: int, fds: list[int], meant: IrqRequest
) -> None:
    payload = struct.pack("<IIIII", 20, flags, VfioIrq.MSIX, start, count)
    assert decode_set_irqs_request_untrusted(payload, fds) == meant
    assert encode_set_irqs_request(meant) == payload


def test_bools() -> None:
    request = IrqRequest(1, 2, 3, IrqAction.MASK, bools=(True, False, True))
    payload = encode_set_irqs_request(request)
    assert payload == struct.pack("<IIIII", 23, 0x0A, 1, 2, 3) + b"\1\0\1"
    assert decode_set_irqs_request_untrusted(payload) == request
    loose = struct.pack("<IIIII", 20, 0x0A, 1, 2, 3) + b"\2\0\xff"
    assert decode_set_irqs_request_untrusted(loose) == request


@given(u32, u32, u32, st.sampled_from(IrqAction))
def test_set_round_trip_without_data(index: int, start: int, count: int, action: IrqAction) -> None:
    if start + count > 1 << 32 or (action is IrqAction.TRIGGER and not count and start):
        return
    request = IrqRequest(index, start, count, action)
    assert decode_set_irqs_request_untrusted(encode_set_irqs_request(request)) == request


def test_the_last_sub_index_there_can_be() -> None:
    payload = struct.pack("<IIIII", 20, 0x11, 0, 0xFFFFFFFF, 1)
    assert decode_set_irqs_request_untrusted(payload).start == 0xFFFFFFFF


def head(flags: int, start: int = 0, count: int = 1, argsz: int = 20) -> bytes:
    return struct.pack("<IIIII", argsz, flags, 2, start, count)


@pytest.mark.parametrize(
    ("payload", "fds", "says"),
    [
        (b"", [], "payload of 0 bytes, 20 are needed"),
        (head(0x24)[:19], [], "payload of 19 bytes"),
        (head(0x24, argsz=19), [], "argsz 19, at least 20"),
        (head(0x24, argsz=21), [], "argsz 21"),
        (head(0x20), [], "flags 0x20; exactly one"),
        (head(0x23), [], "flags 0x23; exactly one"),
        (head(0x25), [], "flags 0x25; exactly one"),
        (head(0x27), [], "flags 0x27; exactly one"),
        (head(0x01), [], "flags 0x1; exactly one"),
        (head(0x31), [], "flags 0x31; exactly one"),
        (head(0x39), [], "flags 0x39; exactly one"),
        (head(0x61), [], "flags 0x61; exactly one"),
        (head(0x80000021), [], "flags 0x80000021; exactly one"),
        (head(0x24, 2, 0xFFFFFFFF), [], "4294967295 sub-indices from 2 passes"),
        (head(0x21, 0xFFFFFFFF, 2), [], "passes the end of 32 bits"),
        (head(0x24, count=2), [7], "of 2 sub-indices brings 1 eventfds"),
        (head(0x24, count=1), [7, 8], "of 1 sub-indices brings 2 eventfds"),
        (head(0x24, count=0), [7], "of 0 sub-indices brings 1 eventfds"),
        (head(0x24, count=1) + b"\0", [7], "has 21 bytes"),
        (head(0x0C), [7], "eventfds for MASK"),
        (head(0x14), [7], "eventfds for UNMASK"),
        (head(0x21), [7], "flags 0x21 that want none"),
        (head(0x22) + b"\1", [7], "flags 0x22 that want none"),
        (head(0x22), [], "has 20 bytes"),
        (head(0x22) + b"\1\1", [], "has 22 bytes"),
        (head(0x22, argsz=22) + b"\1", [], "argsz 22"),
        (head(0x22, count=0xFFFFFFFF), [], "make 4294967315"),
        (head(0x21) + b"\0", [], "has 21 bytes"),
        (head(0x21, 1, 0), [], "start must be 0"),
    ],
)
def test_bad_set_irqs(payload: bytes, fds: list[int], says: str) -> None:
    before = list(fds)
    with pytest.raises(ClientError, match=says) as caught:
        decode_set_irqs_request_untrusted(payload, fds)
    assert caught.value.errno == errno.EINVAL
    assert fds == before


@pytest.mark.parametrize(("start", "count"), [(0, 0), (0, 4), (3, 1), (4, 0)])
def test_sub_indices_that_are_there(start: int, count: int) -> None:
    check_irq_range(IrqRequest(2, start, count, IrqAction.UNMASK), IrqInfo(4, IrqFlags.EVENTFD))


def test_disabling_an_absent_index_is_fine() -> None:
    check_irq_range(IrqRequest(0, 0, 0, IrqAction.TRIGGER), IrqInfo(0, IrqFlags(0)))


@pytest.mark.parametrize(("start", "count"), [(0, 5), (4, 1), (5, 0), (0xFFFFFFFF, 1)])
def test_sub_indices_that_are_not_there(start: int, count: int) -> None:
    with pytest.raises(ClientError, match="index 2 has 4") as caught:
        check_irq_range(IrqRequest(2, start, count, IrqAction.UNMASK), IrqInfo(4, IrqFlags.EVENTFD))
    assert caught.value.errno == errno.EINVAL
