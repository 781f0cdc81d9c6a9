"""The stream between the servers of two hosts: which frame may follow which, and the totals.

A device, and pages of guest memory, go from a sender to a receiver over any pipe: ssh, a socket, a
file.  A direction is the magic number and then frames (`transfer_frames`).  With a way back:

    sender                         receiver
    HELLO DEVICE          →
                          ←        HELLO DEVICE ACK(READY)
    STATE… SYNC           →                                       the source still runs
                          ←        ACK(TAKEN)
    STATE… PAGES… END     →                                       the source is stopped
                          ←        ACK(LOADED)
    RUN                   →
                          ←        ACK(RUNNING)

Either may say ABORT, and why, instead of anything else.  Until RUN has been sent, the source runs
on whatever happens, and the target is reset; a receiver that has not seen RUN never lets it run.
Afterwards the source stays stopped: two running devices of one guest are worse than none.

Without a way back (`Options.ONE_WAY`) there are no SYNC and RUN: END lets the target run.

A stream is not resumed in its middle.  What precedes the stop of the source is an image of some
kilobytes, which is taken anew faster than one could agree where to go on; after the stop the guest
stands still, and had better run on at the source than wait for a network.

Rejected: QEMU's migration stream and its channels (no way back that a pipe has, no checksums);
HTTP and varlink (one message is one answer, base64).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from vfio_user_virtio.errors import ConnectionLost
from vfio_user_virtio.migration.transfer_frames import (
    FRAME_HEADER_SIZE,
    Abort,
    Ack,
    DeviceFacts,
    End,
    Frame,
    Hello,
    Options,
    Pages,
    Run,
    Stage,
    State,
    Sync,
    ZeroPages,
    damaged,
    decode_frame_header_untrusted,
    decode_frame_untrusted,
    encode_frame,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from vfio_user_virtio.migration.transfer_frames import FrameHeader
    from vfio_user_virtio.protocol.header import Buffer

MAGIC: Final = b"\x93vuvmove"
"""What a direction begins with; the first byte is in no text."""

FORWARD: Final[Mapping[str, Mapping[type[Frame], str]]] = {
    "hello": {Hello: "device"},
    "device": {DeviceFacts: "content", Abort: "over"},
    "content": {
        State: "content",
        Pages: "content",
        ZeroPages: "content",
        Sync: "content",
        End: "ended",
        Abort: "over",
    },
    "ended": {Run: "over", Abort: "over"},
    "over": {},
}
"""By what came last, the frames that a sender may send next, and what that leads to."""

BACKWARD: Final[Mapping[str, Mapping[type[Frame], str]]] = {
    "hello": {Hello: "device"},
    "device": {DeviceFacts: "ready", Abort: "over"},
    "ready": {Ack: "acknowledging", Abort: "over"},
    "acknowledging": {Ack: "acknowledging", Abort: "over"},
    "over": {},
}
"""The same for a receiver; the stages of its ACKs only ever rise, but for TAKEN after TAKEN."""

_ENOUGH: Final = {"over"}
_ENOUGH_ONE_WAY: Final = {"over", "ended"}


class FrameWriter:
    """Makes the bytes of one direction.  `sequence`: how many frames there have been."""

    def __init__(self) -> None:
        self.sequence = 0
        self.state_bytes = 0
        self.page_bytes = 0
        self.zero_bytes = 0

    def write(self, frame: Frame) -> bytes:
        """The bytes of the next frame, after the magic number if it is the first."""
        data = encode_frame(frame, self.sequence)
        match frame:
            case State(state):
                self.state_bytes += len(state)
            case Pages(_, pages):
                self.page_bytes += len(pages)
            case ZeroPages(_, size):
                self.zero_bytes += size
        self.sequence += 1
        return data if self.sequence > 1 else MAGIC + data

    @property
    def end(self) -> End:
        """The totals of what was written."""
        return End(self.state_bytes, self.page_bytes, self.zero_bytes)


class FrameReader:
    """Takes one direction apart, however it was cut; `order` is `FORWARD` or `BACKWARD`.

    `sequence`: how many frames there have been, those that were skipped included.
    """

    def __init__(self, order: Mapping[str, Mapping[type[Frame], str]]) -> None:
        self.sequence = 0
        self.hello: Hello | None = None
        self.state_bytes = 0
        self.page_bytes = 0
        self.zero_bytes = 0
        self._order = order
        self._place = "hello"
        self._stage: Stage | None = None
        self._buffer = bytearray()
        self._magic_due = True
        self._header: FrameHeader | None = None
        self._failed: str | None = None

    @property
    def over(self) -> bool:
        """Whether all has come that has to."""
        one_way = self.hello is not None and Options.ONE_WAY in self.hello.options
        return self._place in (_ENOUGH_ONE_WAY if one_way else _ENOUGH)

    def feed_untrusted(self, data: Buffer) -> Iterator[Frame]:
        """Take the next bytes; give each frame as it completes.

        Raises ConnectionLost for what is damaged, unknown or out of order, and ever after.
        """
        if self._failed is not None:
            raise ConnectionLost(self._failed)
        self._buffer += data
        try:
            yield from self._frames_untrusted()
        except ConnectionLost as error:
            self._failed = str(error)
            self._buffer.clear()
            raise

    def finish_untrusted(self) -> None:
        """The peer closed its side.  Raises ConnectionLost if that was too early."""
        if self._failed is not None:
            raise ConnectionLost(self._failed)
        if self._buffer or self._header is not None:
            self._failed = (
                f"the transfer stream ends inside frame {self.sequence}, {len(self._buffer)} bytes "
                f"into its {'header' if self._header is None else 'payload'}"
            )
        elif not self.over:
            self._failed = f"the transfer stream ends after frame {self.sequence}, before its end"
        if self._failed is not None:
            raise ConnectionLost(self._failed)

    def _frames_untrusted(self) -> Iterator[Frame]:
        if self._magic_due and not self._take_magic_untrusted():
            return
        while True:
            if self._header is None:
                if len(self._buffer) < FRAME_HEADER_SIZE:
                    return
                self._header = decode_frame_header_untrusted(self._buffer, self.sequence)
                del self._buffer[:FRAME_HEADER_SIZE]
            if len(self._buffer) < self._header.size:
                return
            header, self._header = self._header, None
            payload = bytes(memoryview(self._buffer)[: header.size])
            del self._buffer[: header.size]
            frame = decode_frame_untrusted(header, payload)
            self.sequence += 1
            if frame is not None:
                self._check_order_untrusted(frame)
                yield frame

    def _take_magic_untrusted(self) -> bool:
        """Whether it has come."""
        found = bytes(self._buffer[: len(MAGIC)])
        if not MAGIC.startswith(found):
            raise ConnectionLost(
                f"this is no transfer stream: it begins with {found!r}; "
                "is a vfio-user-virtio at the other end, and does nothing else print there?"
            )
        if len(found) < len(MAGIC):
            return False
        del self._buffer[: len(MAGIC)]
        self._magic_due = False
        return True

    def _check_order_untrusted(self, frame: Frame) -> None:
        follows = self._order[self._place]
        name = type(frame).__name__
        if type(frame) not in follows:
            expected = " or ".join(kind.__name__ for kind in follows) or "nothing"
            raise damaged(f"{name} came where {expected} was due")
        self._place = follows[type(frame)]
        match frame:
            case Hello():
                self.hello = frame
            case State(data):
                self.state_bytes += len(data)
            case Pages(_, data):
                self.page_bytes += len(data)
            case ZeroPages(_, size):
                self.zero_bytes += size
            case End():
                self._check_totals_untrusted(frame)
            case Ack(stage):
                self._check_stage_untrusted(stage)
            case Sync() | Run() if self._is_one_way:
                raise damaged(f"{name} came in a stream without a way back")

    @property
    def _is_one_way(self) -> bool:
        return self.hello is not None and Options.ONE_WAY in self.hello.options

    def _check_totals_untrusted(self, end: End) -> None:
        came = End(self.state_bytes, self.page_bytes, self.zero_bytes)
        if end != came:
            raise damaged(f"its end tells of {_totals(end)}, but {_totals(came)} came")

    def _check_stage_untrusted(self, stage: Stage) -> None:
        last, self._stage = self._stage, stage
        due = _NEXT_STAGES[last]
        if stage not in due:
            names = " or ".join(one.name for one in due) or "nothing"
            raise damaged(f"{stage.name} was acknowledged where {names} was due")


_NEXT_STAGES: Final[Mapping[Stage | None, tuple[Stage, ...]]] = {
    None: (Stage.READY,),
    Stage.READY: (Stage.TAKEN, Stage.LOADED),
    Stage.TAKEN: (Stage.TAKEN, Stage.LOADED),
    Stage.LOADED: (Stage.RUNNING,),
    Stage.RUNNING: (),
}


def _totals(end: End) -> str:
    return (
        f"{end.state_bytes} bytes of state, {end.page_bytes} of pages "
        f"and {end.zero_bytes} of zero pages"
    )
