"""Ports and frames for tests of the switch: real enough to hold what was delivered."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vfio_user_virtio.backends.software.ports import HEAD_SIZE, Offload

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vfio_user_virtio.backends.software.ports import Frame
    from vfio_user_virtio.backends.software.switch import Switch

ALL = Offload.CSUM | Offload.TSO4 | Offload.TSO6 | Offload.ECN | Offload.USO4 | Offload.USO6
BROADCAST = b"\xff" * 6
ROOM = 70_000


def mac(number: int) -> bytes:
    return b"\x52\x54\x00" + number.to_bytes(3, "big")


def ethernet(
    destination: bytes, source: bytes, payload: bytes = b"hello", vlan: int | None = None
) -> bytes:
    tag = b"" if vlan is None else b"\x81\x00" + vlan.to_bytes(2, "big")
    return destination + source + tag + b"\x88\xb5" + payload


def as_frame(data: bytes, header: bytes = bytes(12)) -> tuple[Frame, int]:
    """An Ethernet frame as a port hands it over: head, then the rest in two pieces."""
    whole = header + data
    head, rest = whole[:HEAD_SIZE], memoryview(whole)[HEAD_SIZE:]
    return (head, rest[:3], rest[3:]), len(whole)


class FakeAlarm:
    def __init__(self) -> None:
        self.delays: list[float] = []

    def __call__(self, delay: float) -> None:
        self.delays.append(delay)


class FakeClock:
    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


class MemberPort:
    """A member: holds `room` frames, and sends again what it could not send."""

    def __init__(self, switch: Switch, name: str, offloads: Offload = ALL) -> None:
        self.switch = switch
        self.name = name
        self.offloads = offloads
        self.up = True
        self.room = ROOM
        self.received: list[bytes] = []
        self.headers: list[bytes] = []
        self.flushes = 0
        self.queue: list[tuple[Frame, int]] = []
        self.reserved = bytearray(ROOM)

    def deliver(self, frame: Frame, size: int) -> bool:
        if not self.room:
            return False
        self.room -= 1
        data = b"".join(frame)
        assert len(data) == size
        assert isinstance(frame[0], bytes)
        assert len(frame[0]) >= min(HEAD_SIZE, size)
        self.headers.append(data[:12])
        self.received.append(data[12:])
        return True

    def flush(self) -> None:
        self.flushes += 1

    def reserve(self) -> Sequence[memoryview] | None:
        return (memoryview(self.reserved),) if self.room else None

    def commit(self, size: int) -> None:
        assert self.deliver((bytes(self.reserved[:size]),), size)

    def resume(self) -> None:
        queue, self.queue = self.queue, []
        for position, (frame, size) in enumerate(queue):
            if not self.switch.forward(self, frame, size):
                self.queue = queue[position:]
                return

    def send(self, data: bytes, header: bytes = bytes(12)) -> bool:
        frame, size = as_frame(data, header)
        if self.queue or not self.switch.forward(self, frame, size):
            self.queue.append((frame, size))
            return False
        return True

    def make_room(self, room: int = ROOM) -> None:
        self.room = room
        self.switch.writable(self)

    def take(self) -> list[bytes]:
        received, self.received = self.received, []
        self.headers.clear()
        return received


class UplinkPort(MemberPort):
    """An uplink: no memory to be read into, and knows what it has been told."""

    def __init__(self, switch: Switch, name: str = "uplink", offloads: Offload = ALL) -> None:
        super().__init__(switch, name, offloads)
        self.polls = 0
        self.told: list[Offload] = []

    def poll(self) -> None:
        self.polls += 1

    def receivers_take(self, offloads: Offload) -> None:
        self.told.append(offloads)
