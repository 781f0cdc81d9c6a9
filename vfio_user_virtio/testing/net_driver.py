"""A virtio-net driver for tests (virtio 1.4, Network Device), over `VirtioPci` and `GuestRam`.

Why: to see every frame, header and interrupt that a device makes, and to use it in ways that no
driver of a real guest does, within milliseconds.  It negotiates what it is told, posts receive
buffers with or without MRG_RXBUF, sends frames in as many segments as a test likes, and speaks the
control queue.

A driver is used by one event loop.  Each queue has one user at a time: tasks that receive or send
on the same pair take turns.  `start` and `stop` may be called again and again, so a test of resets
keeps its driver.

    async with connect_socket(sock, memory=ram) as client:
        await ram.map(client)
        driver = NetDriver(await VirtioPci.open(client), ram)
        await driver.start()
        await driver.send(frame)
        answer = await driver.receive()
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import attrs
import trio

from vfio_user_virtio.testing.control_commands import ControlCommands
from vfio_user_virtio.testing.driver_queue import DeviceBroke, DriverQueue, QueueFull
from vfio_user_virtio.testing.net_header import (
    NET_HEADER_SIZE,
    NO_OFFLOAD,
    NetHeader,
    decode_net_header,
)
from vfio_user_virtio.testing.virtio_pci import Register
from vfio_user_virtio.virtio.common_config import NO_VECTOR
from vfio_user_virtio.virtio.features import NEEDS, NEEDS_ONE, Feature, mask_of
from vfio_user_virtio.virtio.net_config import NET_CONFIG_SIZE, NetConfig, decode_net_config

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from vfio_user_virtio.testing.driver_queue import Segment, Used
    from vfio_user_virtio.testing.guest_ram import GuestBuffer, GuestRam
    from vfio_user_virtio.testing.interrupt import Interrupt
    from vfio_user_virtio.testing.virtio_pci import VirtioPci

KNOWN_FEATURES: Final = mask_of(
    feature
    for feature in Feature
    if feature
    not in (
        Feature.RING_PACKED,
        Feature.IN_ORDER,
        Feature.NOTIF_CONFIG_DATA,
        Feature.ADMIN_VQ,
        Feature.SUSPEND,
        Feature.HASH_REPORT,
        Feature.HASH_TUNNEL,
        Feature.RSC_EXT,
        Feature.STANDBY,
    )
)
"""What this driver can live with."""

GSO_FEATURES: Final = mask_of(
    (
        Feature.GUEST_TSO4,
        Feature.GUEST_TSO6,
        Feature.GUEST_UFO,
        Feature.GUEST_USO4,
        Feature.GUEST_USO6,
    )
)
SMALL_BUFFER: Final = 1526
LARGE_BUFFER: Final = 65_601
MERGEABLE_BUFFER: Final = 2048
"""Receive buffers, header included: the least that the standard allows without MRG_RXBUF, with
frames of 1514 bytes and with unsegmented ones; and one of a size that Linux posts with it."""

_TABLE: Final = 64
"""Receive buffers posted unless told otherwise."""


@attrs.frozen
class ReceivedFrame:
    """An Ethernet frame from the device; `buffers` is how many it was spread over."""

    data: bytes
    header: NetHeader
    pair: int
    buffers: int


@attrs.define
class _Port:
    """One virtqueue of the driver.  Tokens are the memory that a buffer is made of."""

    index: int
    queue: DriverQueue[GuestBuffer]
    interrupt: Interrupt
    vector: int
    turn: trio.Lock = attrs.field(factory=trio.Lock)


def consistent(features: int) -> int:
    """`features` without those whose requirements are not among them, as a driver must ask."""
    while True:
        kept = features
        for feature, needed in NEEDS.items():
            if mask_of(needed) & ~features:
                features &= ~feature.mask
        for feature, choice in NEEDS_ONE.items():
            if not mask_of(choice) & features:
                features &= ~feature.mask
        if features == kept:
            return features


class NetDriver:
    """See the module head.

    `features`: what to negotiate, as far as the device offers it and it is consistent.
    `max_pairs`: queue pairs to use at most.  `queue_size`: of each queue, None for the device's.
    `rx_buffers`, `rx_buffer_size`: receive buffers per pair and their bytes, header included; None
    for what the features ask for.  `segment`: bytes of a buffer that one descriptor covers, None
    for all of them.  `msix`: a vector for each queue and one for the configuration, else INTx.
    """

    def __init__(
        self,
        pci: VirtioPci,
        ram: GuestRam,
        *,
        features: int = KNOWN_FEATURES,
        max_pairs: int = 1,
        queue_size: int | None = None,
        rx_buffers: int = _TABLE,
        rx_buffer_size: int | None = None,
        segment: int | None = None,
        msix: bool = True,
    ) -> None:
        self.pci = pci
        self.ram = ram
        self.features = 0
        self.pairs = 1
        self._wanted = features
        self._max_pairs = max_pairs
        self._queue_size = queue_size
        self._rx_buffers = rx_buffers
        self._rx_buffer_size = rx_buffer_size
        self._segment = segment
        self._msix = msix
        self.control = ControlCommands(self.command)
        self._ports: dict[int, _Port] = {}
        self._control_index = 0
        self._config_interrupt: Interrupt | None = None
        self._vectors: dict[int, tuple[Interrupt, int]] = {}

    # --- life ----------------------------------------------------------------------------------

    async def start(self, *, rx: bool = True) -> None:
        """Bring the device up, from whatever state it is in, and post receive buffers if `rx`.

        Raises FeaturesRefused, DeviceBroke.
        """
        pci = self.pci
        await pci.reset()
        self._forget()
        await pci.set_up()
        self.features = consistent(self._wanted & await pci.offered())
        await pci.negotiate(self.features)
        offered_pairs = 1
        if self.has(Feature.MQ):
            offered_pairs = (await self.config()).max_virtqueue_pairs
        self.pairs = min(self._max_pairs, offered_pairs)
        self._control_index = 2 * offered_pairs
        indices = list(range(2 * self.pairs))
        if self.has(Feature.CTRL_VQ):
            indices.append(self._control_index)
        await self._take_interrupts(indices)
        for index in indices:
            await self._enable(index)
        await pci.driver_ok()
        if rx:
            for pair in range(self.pairs):
                await self.post(pair)
        if self.pairs > 1:
            await self.control.set_pairs(self.pairs)

    async def stop(self) -> None:
        """Reset the device and give back all memory."""
        await self.pci.reset()
        await self.pci.release_interrupts()
        self._forget()

    def has(self, feature: Feature) -> bool:
        """Whether `feature` was negotiated."""
        return bool(self.features & feature.mask)

    async def config(self) -> NetConfig:
        """The device configuration as it stands."""
        return decode_net_config(await self.pci.device_config(0, NET_CONFIG_SIZE))

    async def config_changed(self, seen: int | None = None) -> None:
        """Wait for a configuration interrupt; see `Interrupt.wait`."""
        assert self._config_interrupt is not None
        await self._config_interrupt.wait(seen)

    def queue(self, index: int) -> DriverQueue[GuestBuffer]:
        """The queue of that number: RX of pair n is 2n, TX 2n + 1."""
        return self._ports[index].queue

    def interrupt(self, index: int) -> Interrupt:
        """The interrupt of queue `index`."""
        return self._ports[index].interrupt

    @property
    def control_index(self) -> int:
        """The number of the control queue, which depends on MQ being negotiated."""
        return self._control_index

    async def kick(self, index: int) -> None:
        """Notify queue `index`, whether or not the device asked for it."""
        await self.pci.notify(index, self._ports[index].queue.ring.avail_idx)

    async def reset_queue(self, index: int) -> None:
        """RING_RESET: stop queue `index` and start it again, empty; RX buffers are posted anew."""
        await self.pci.reset_queue(index)
        self._close(self._ports.pop(index))
        await self._enable(index)
        if index % 2 == 0 and index != self._control_index:
            await self.post(index // 2)

    async def _take_interrupts(self, indices: Sequence[int]) -> None:
        pci = self.pci
        if not self._msix:
            interrupt = await pci.take_intx()
            self._config_interrupt = interrupt
            self._vectors = dict.fromkeys(indices, (interrupt, NO_VECTOR))
            return
        available = await pci.msix_vectors()
        interrupts = await pci.take_msix(min(available, len(indices) + 1))
        self._config_interrupt = interrupts[0]
        await pci.write(Register.CONFIG_MSIX_VECTOR, 0)
        for number, index in enumerate(indices):
            vector = min(1 + number, len(interrupts) - 1)
            self._vectors[index] = (interrupts[vector], vector)

    async def _enable(self, index: int) -> None:
        size = await self.pci.queue_size(index)
        queue: DriverQueue[GuestBuffer] = DriverQueue(
            self.ram,
            min(size, self._queue_size or size),
            event_idx=self.has(Feature.EVENT_IDX),
            indirect=self.has(Feature.INDIRECT_DESC),
        )
        interrupt, vector = self._vectors[index]
        self._ports[index] = _Port(index, queue, interrupt, vector)
        await self.pci.enable_queue(index, queue.ring, vector=vector)

    def _forget(self) -> None:
        for port in self._ports.values():
            self._close(port)
        self._ports.clear()
        self.features = 0

    def _close(self, port: _Port) -> None:
        for buffer in port.queue.close():
            self.ram.free(buffer)

    # --- receiving -----------------------------------------------------------------------------

    @property
    def rx_buffer_size(self) -> int:
        """Bytes of a receive buffer, header included."""
        if self._rx_buffer_size is not None:
            return self._rx_buffer_size
        if self.has(Feature.MRG_RXBUF):
            return MERGEABLE_BUFFER
        return LARGE_BUFFER if self.features & GSO_FEATURES else SMALL_BUFFER

    async def post(self, pair: int = 0, buffers: int | None = None) -> None:
        """Post `buffers` more receive buffers (by default up to what the driver keeps)."""
        port = self._ports[2 * pair]
        if buffers is None:
            buffers = self._rx_buffers - port.queue.outstanding
        for _ in range(buffers):
            buffer = self.ram.allocate_for_device(self.rx_buffer_size)
            try:
                port.queue.add(buffer, writable=self._segments(buffer))
            except QueueFull:
                self.ram.free(buffer)
                break
        await self._publish(port)

    async def receive(self, pair: int = 0, *, repost: bool = True) -> ReceivedFrame:
        """Wait for the next frame on queue pair `pair`; its buffers are posted again if `repost`.

        Raises DeviceBroke for a frame that is shorter than its header or its buffers.
        """
        port = self._ports[2 * pair]
        async with port.turn:
            first = await self._next_used(port)
            used = [first]
            header = decode_net_header(self._written(first))
            count = header.num_buffers
            if not self.has(Feature.MRG_RXBUF):
                if count != 1:
                    raise DeviceBroke(f"num_buffers is {count} without MRG_RXBUF; it must be 1")
            elif not 1 <= count <= port.queue.size:
                raise DeviceBroke(f"num_buffers is {count} in a ring of {port.queue.size}")
            while len(used) < count:
                used.append(await self._next_used(port))
            data = b"".join(self._written(entry) for entry in used)[NET_HEADER_SIZE:]
            for entry in used[:-1]:
                if entry.length != entry.token.size:
                    raise DeviceBroke(f"{entry.length} bytes in a buffer that is not the last")
            for entry in used:
                if repost:
                    port.queue.add(entry.token, writable=self._segments(entry.token))
                else:
                    self.ram.free(entry.token)
        if repost:
            await self._publish(port)
        return ReceivedFrame(data, header, pair, count)

    def received(self, pair: int = 0) -> bool:
        """Whether a frame waits on queue pair `pair`."""
        return self._ports[2 * pair].queue.used_waiting > 0

    @staticmethod
    def _written(used: Used[GuestBuffer]) -> bytes:
        if used.length == 0:
            raise DeviceBroke("a receive buffer came back empty")
        return bytes(used.token.memory[: used.length])

    # --- sending -------------------------------------------------------------------------------

    async def send(
        self,
        frame: bytes,
        header: NetHeader | bytes = NO_OFFLOAD,
        *,
        pair: int = 0,
        segments: Sequence[int] | None = None,
    ) -> None:
        """Give an Ethernet frame to the device; wait only while the queue is full.

        `segments`: the sizes of the descriptors' parts of header and frame, instead of `segment`;
        what they leave over is the last part.
        """
        head = header if isinstance(header, bytes) else header.encode()
        port = self._ports[2 * pair + 1]
        buffer = self.ram.allocate(len(head) + len(frame))
        buffer.memory[:] = head + frame
        parts = self._segments(buffer) if segments is None else _cut(buffer, segments)
        try:
            async with port.turn:
                await self._add_sent(port, buffer, parts)
        except BaseException:
            self.ram.free(buffer)
            raise
        await self._publish(port)

    async def _add_sent(self, port: _Port, buffer: GuestBuffer, parts: list[Segment]) -> None:
        """Add a frame to a TX queue once there is room for it."""
        self._reclaim(port)
        while True:
            try:
                port.queue.add(buffer, readable=parts)
            except QueueFull:
                if not port.queue.outstanding:
                    raise
                await self._wait_used(port)
                self._reclaim(port)
            else:
                return

    async def flush(self, pair: int = 0) -> None:
        """Wait until the device has given back every frame that was sent on `pair`."""
        port = self._ports[2 * pair + 1]
        async with port.turn:
            self._reclaim(port)
            while port.queue.outstanding:
                await self._wait_used(port)
                self._reclaim(port)

    def _reclaim(self, port: _Port) -> None:
        for used in port.queue.collect():
            self.ram.free(used.token)

    # --- the control queue ---------------------------------------------------------------------

    async def command(self, command_class: int, command: int, data: bytes = b"") -> int:
        """Execute a control command; the ack byte (0 OK, 1 ERR, 255 if nothing was written)."""
        return await self.raw_command(bytes((command_class, command)) + data)

    async def raw_command(self, readable: bytes, *, room: int = 1) -> int:
        """As `command`, with any bytes, and with `room` writable bytes for the answer."""
        port = self._ports[self._control_index]
        buffer = self.ram.allocate_for_device(len(readable) + max(room, 1))
        ack = len(readable)
        buffer.memory[:ack] = readable
        buffer.memory[ack] = 0xFF
        async with port.turn:
            port.queue.add(
                buffer,
                _cut(buffer, (2,) if ack > 2 else (), end=ack),
                [(buffer.iova + ack, room)] if room else (),
            )
            await self._publish(port)
            await self._wait_used(port)
            (used,) = port.queue.collect()
        result = used.token.memory[ack]
        self.ram.free(used.token)
        return int(result)

    # --- waiting -------------------------------------------------------------------------------

    async def _publish(self, port: _Port) -> None:
        if port.queue.publish():
            await self.kick(port.index)

    async def _next_used(self, port: _Port) -> Used[GuestBuffer]:
        while not port.queue.used_waiting:
            await self._wait_used(port)
        return port.queue.collect(limit=1)[0]

    async def _wait_used(self, port: _Port) -> None:
        """Return once the device has used a buffer that was not collected yet."""
        while True:
            seen = port.interrupt.count
            if not port.queue.enable_interrupts():
                await trio.lowlevel.checkpoint()
                return
            await port.interrupt.wait(seen)

    def _segments(self, buffer: GuestBuffer) -> list[Segment]:
        if self._segment is None:
            return [(buffer.iova, buffer.size)]
        return _cut(buffer, [self._segment] * (buffer.size // self._segment))


def _cut(buffer: GuestBuffer, sizes: Iterable[int], *, end: int | None = None) -> list[Segment]:
    """The parts of `buffer` up to `end`, of `sizes` bytes each, and the rest."""
    end = buffer.size if end is None else end
    segments: list[Segment] = []
    position = 0
    for size in sizes:
        segments.append((buffer.iova + position, size))
        position += size
    if position < end:
        segments.append((buffer.iova + position, end - position))
    return segments
