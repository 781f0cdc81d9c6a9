"""Everything that a vfio-user client can learn about a virtio-net device without driving it.

For `probe`.  Learning is nearly all reading.  Two registers must be written to read what is behind
them, device_feature_select and queue_select; both get back what was in them.  Nothing else is
written, and the ISR status, which reading would clear, is not read.

The server is not trusted: what it announces bounds nothing here (`MAX_…` do), and what it refuses
is a problem that is noted, while the rest is still read.  ConnectionLost leaves: then there is
nothing more to be read.

Sources: vfio-user, Protocol Specification; virtio 1.4, Common configuration structure layout and
Network Device.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

import attrs

from vfio_user_virtio.device import VfioIrq, VfioRegion
from vfio_user_virtio.errors import RemoteError
from vfio_user_virtio.virtio.common_config import COMMON_CONFIG_SIZE, Status
from vfio_user_virtio.virtio.features import Feature, feature_names
from vfio_user_virtio_server.pci_facts import (
    PciFacts,
    Place,
    decode_config_untrusted,
    virtio_places,
)

if TYPE_CHECKING:
    import enum

    from vfio_user_virtio.protocol.version import Version
    from vfio_user_virtio.transport.client import Client

MAX_REGIONS: Final = 16
MAX_IRQS: Final = 16
MAX_QUEUES: Final = 64
MAX_CONFIG: Final = 4096
FEATURE_WORDS: Final = 4
VIRTIO_VENDOR: Final = 0x1AF4
VIRTIO_NET: Final = 0x1041


@attrs.frozen
class RegionFacts:
    """A region; `areas` are (offset, size) of the parts that a client may map."""

    index: int
    name: str
    size: int
    flags: list[str]
    areas: list[tuple[int, int]]


@attrs.frozen
class IrqFacts:
    """An interrupt index with `count` sub-indices."""

    index: int
    name: str
    count: int
    flags: list[str]


@attrs.frozen
class QueueFacts:
    """A queue's registers; `role` is the standard's name, addresses are IOVAs."""

    index: int
    role: str
    size: int
    enabled: bool
    msix_vector: int
    notify_off: int
    desc: int
    driver: int
    device: int


@attrs.frozen
class VirtioFacts:
    """The common configuration; features by name."""

    features_offered: list[str]
    features_driver: list[str]
    status: list[str]
    config_generation: int
    config_msix_vector: int
    num_queues: int
    queues: list[QueueFacts]


@attrs.frozen
class NetFacts:
    """The device configuration; None for fields that the device has not."""

    mac: str | None
    link_up: bool | None
    announce: bool | None
    max_virtqueue_pairs: int | None
    mtu: int | None
    speed: int | None
    duplex: str | None


@attrs.frozen
class DeviceFacts:
    """Everything.  `problems` says what the server refused, and what was left out."""

    protocol: dict[str, object]
    flags: list[str]
    regions: list[RegionFacts]
    irqs: list[IrqFacts]
    pci: PciFacts | None
    virtio: VirtioFacts | None
    net: NetFacts | None
    problems: list[str]


async def read_device(client: Client) -> DeviceFacts:
    """Read all that there is.  Raises ConnectionLost; RemoteError if even GET_INFO is refused."""
    info = await client.device_info()
    problems: list[str] = []
    reader = _Reader(client, problems)
    regions = await reader.regions(info.num_regions)
    irqs = await reader.irqs(info.num_irqs)
    pci = await reader.config(regions)
    virtio = net = None
    if pci is not None and (pci.vendor_id, pci.device_id) == (VIRTIO_VENDOR, VIRTIO_NET):
        places = virtio_places(pci)
        virtio = await reader.virtio(places.get("COMMON"), places.get("DEVICE"))
        net = await reader.net(places.get("DEVICE"), virtio)
    return DeviceFacts(
        protocol=_protocol(client.version),
        flags=_flag_names(info.flags),
        regions=regions,
        irqs=irqs,
        pci=pci,
        virtio=virtio,
        net=net,
        problems=problems,
    )


class _Reader:
    """Reads from `client`; what is refused goes to `problems`."""

    def __init__(self, client: Client, problems: list[str]) -> None:
        self._client = client
        self._problems = problems

    async def regions(self, count: int) -> list[RegionFacts]:
        found = []
        for index in range(self._bounded("regions", count, MAX_REGIONS)):
            try:
                info = await self._client.region_info(index)
            except RemoteError as error:
                self._problems.append(str(error))
                continue
            if info.fd is not None:
                os.close(info.fd)
            areas = [(area.offset, area.size) for area in info.areas]
            found.append(
                RegionFacts(
                    index, _name(VfioRegion, index), info.size, _flag_names(info.flags), areas
                )
            )
        return found

    async def irqs(self, count: int) -> list[IrqFacts]:
        found = []
        for index in range(self._bounded("interrupts", count, MAX_IRQS)):
            try:
                info = await self._client.irq_info(index)
            except RemoteError as error:
                self._problems.append(str(error))
                continue
            found.append(
                IrqFacts(index, _name(VfioIrq, index), info.count, _flag_names(info.flags))
            )
        return found

    async def config(self, regions: list[RegionFacts]) -> PciFacts | None:
        sizes = {region.index: region.size for region in regions}
        size = min(sizes.get(VfioRegion.CONFIG, 0), MAX_CONFIG)
        data = await self._read(VfioRegion.CONFIG, 0, size) if size else None
        if data is None:
            self._problems.append("the device has no readable configuration space")
            return None
        return decode_config_untrusted(data)

    async def virtio(self, common: Place | None, device: Place | None) -> VirtioFacts | None:
        if common is None or common.length < COMMON_CONFIG_SIZE - 8:
            self._problems.append("the device has no common configuration structure")
            return None
        offered = await self._features(common, 0)
        driver = await self._features(common, 8)
        status = await self._u(common, 20, 1)
        num_queues = await self._u(common, 18, 2)
        accepted = driver if status & Status.FEATURES_OK else offered
        pairs = 1
        if device is not None and device.length >= 10 and accepted & _MANY_QUEUES:
            pairs = await self._u(device, 8, 2)
        return VirtioFacts(
            features_offered=feature_names(offered),
            features_driver=feature_names(driver),
            status=[flag.name or "" for flag in Status if status & flag],
            config_generation=await self._u(common, 21, 1),
            config_msix_vector=await self._u(common, 16, 2),
            num_queues=num_queues,
            queues=await self._queues(common, num_queues, pairs),
        )

    async def net(self, place: Place | None, virtio: VirtioFacts | None) -> NetFacts | None:
        if place is None or virtio is None:
            return None
        offered = set(virtio.features_offered)

        async def field(feature: Feature, offset: int, size: int) -> int | None:
            if feature.name not in offered or place.length < offset + size:
                return None
            return await self._u(place, offset, size)

        mac = None
        if Feature.MAC.name in offered and place.length >= 6:
            mac = ":".join([f"{await self._u(place, offset, 1):02x}" for offset in range(6)])
        status = await field(Feature.STATUS, 6, 2)
        duplex = await field(Feature.SPEED_DUPLEX, 16, 1)
        speed = await field(Feature.SPEED_DUPLEX, 12, 4)
        return NetFacts(
            mac=mac,
            link_up=None if status is None else bool(status & 1),
            announce=None if status is None else bool(status & 2),
            max_virtqueue_pairs=await field(Feature.MQ, 8, 2),
            mtu=await field(Feature.MTU, 10, 2),
            speed=None if speed == 0xFFFF_FFFF else speed,
            duplex=None if duplex is None else _DUPLEX.get(duplex),
        )

    async def _features(self, common: Place, select: int) -> int:
        """The feature word behind the select register at `select`, which is left as it was."""
        before = await self._u(common, select, 4)
        word = 0
        for index in range(FEATURE_WORDS):
            await self._write(common, select, index, 4)
            word |= await self._u(common, select + 4, 4) << 32 * index
        await self._write(common, select, before, 4)
        return word

    async def _queues(self, common: Place, count: int, pairs: int) -> list[QueueFacts]:
        queues = []
        before = await self._u(common, 22, 2)
        for index in range(self._bounded("queues", count, MAX_QUEUES)):
            await self._write(common, 22, index, 2)
            queues.append(
                QueueFacts(
                    index=index,
                    role=_role(index, pairs),
                    size=await self._u(common, 24, 2),
                    enabled=bool(await self._u(common, 28, 2)),
                    msix_vector=await self._u(common, 26, 2),
                    notify_off=await self._u(common, 30, 2),
                    desc=await self._u64(common, 32),
                    driver=await self._u64(common, 40),
                    device=await self._u64(common, 48),
                )
            )
        await self._write(common, 22, before, 2)
        return queues

    async def _u64(self, place: Place, offset: int) -> int:
        low = await self._u(place, offset, 4)
        return low | await self._u(place, offset + 4, 4) << 32

    async def _u(self, place: Place, offset: int, size: int) -> int:
        """The field of `size` bytes; 0 when it cannot be read, which is noted."""
        data = await self._read(place.bar, place.offset + offset, size)
        return 0 if data is None else int.from_bytes(data, "little")

    async def _read(self, region: int, offset: int, size: int) -> bytes | None:
        try:
            return await self._client.region_read(region, offset, size)
        except RemoteError as error:
            self._problems.append(f"{size} bytes at {offset:#x} of region {region}: {error}")
            return None

    async def _write(self, place: Place, offset: int, value: int, size: int) -> None:
        data = value.to_bytes(size, "little")
        try:
            await self._client.region_write(place.bar, place.offset + offset, data)
        except RemoteError as error:
            self._problems.append(f"select register at {offset:#x}: {error}")

    def _bounded(self, what: str, count: int, limit: int) -> int:
        if count > limit:
            self._problems.append(f"the first {limit} of {count} {what} are shown")
        return min(count, limit)


_MANY_QUEUES: Final = Feature.MQ.mask | Feature.RSS.mask
_DUPLEX: Final = {0: "half", 1: "full"}


def _protocol(version: Version) -> dict[str, object]:
    granted = version.capabilities
    return {
        "version": f"{version.major}.{version.minor}",
        "max_msg_fds": granted.max_msg_fds,
        "max_data_xfer_size": granted.max_data_xfer_size,
        "max_dma_maps": granted.max_dma_maps,
        "pgsizes": granted.pgsizes,
        "write_multiple": granted.write_multiple,
        "twin_socket": granted.twin_socket is not None and granted.twin_socket.supported,
        "migration": granted.migration is not None,
    }


def _role(index: int, pairs: int) -> str:
    """The standard's name of a queue when `pairs` RX/TX pairs are in use or could be."""
    if index == 2 * pairs:
        return "controlq"
    kind = "transmitq" if index & 1 else "receiveq"
    return f"{kind}{index // 2 + 1}" if index < 2 * pairs else "unused"


def _name(names: type[enum.IntEnum], index: int) -> str:
    return names(index).name if index < len(names) else f"index {index}"


def _flag_names(flags: enum.IntFlag) -> list[str]:
    return [flag.name or "" for flag in type(flags) if flag in flags]
