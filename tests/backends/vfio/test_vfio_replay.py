"""A function is woken: which queues are kicked and how, and which interrupts are sent."""

from __future__ import annotations

import errno
import os
import struct
from typing import TYPE_CHECKING, Final

import pytest

from tests.backends.vfio.model_kernel import VECTORS
from vfio_user_virtio.backends.vfio.function import VfFunction
from vfio_user_virtio.backends.vfio.replay import kick_queues
from vfio_user_virtio.backends.vfio.uapi import DeviceIoctl
from vfio_user_virtio.device import IrqAction, IrqRequest, VfioIrq, VfioRegion
from vfio_user_virtio.errors import ClientError
from vfio_user_virtio.testing.loopback import served
from vfio_user_virtio.virtio.common_config import CommonConfig, Status
from vfio_user_virtio.virtio.features import Feature, mask_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.backends.vfio.model_kernel import ModelKernel

BAR: Final = 4
COMMON: Final = 0x100
NOTIFY: Final = 0x1000
MULTIPLIER: Final = 4
QUEUES: Final = 5
ENABLED: Final = (0, 1, 4)
QUEUE_NOTIF_CONFIG_DATA: Final = 56
BASIC: Final = mask_of((Feature.VERSION_1, Feature.MAC))
UP: Final = Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK | Status.DRIVER_OK
KICKS: Final = [(BAR, NOTIFY + MULTIPLIER * index, index) for index in ENABLED]
ARMED: Final = IrqAction.TRIGGER


class NothingHappens:
    """`Consequences` of registers that no device is behind."""

    def features_accepted(self, features: int) -> None: ...

    def driver_ok(self) -> None: ...

    def queue_enabled(self, index: int) -> None: ...

    def queue_reset(self, index: int) -> None: ...

    def device_reset(self) -> None: ...


class Function:
    """A function with the registers of our model and a driver that is up; see `Registers`."""

    name: Final = "vf"

    def __init__(self, features: int = BASIC, *, notify_length: int = 0x1000) -> None:
        self.common = CommonConfig(
            offered=features,
            num_queues=QUEUES,
            queue_size=256,
            num_vectors=3,
            consequences=NothingHappens(),
        )
        state = self.common.state
        state.driver_features, state.status = features, int(UP)
        for index in ENABLED:
            state.queues[index].enabled = True
        state.queue_select, state.driver_feature_select = 3, 0
        self.command = 0x6
        self.written: list[tuple[int, int, int]] = []
        """Outside of the common configuration: region, offset and value."""
        self._capabilities = (
            struct.pack("<BBBBBBxxII", 9, 0x50, 16, 1, BAR, 0, COMMON, 64),
            struct.pack("<BBBBBBxxIII", 9, 0, 20, 2, BAR, 0, NOTIFY, notify_length, MULTIPLIER),
        )

    def read(self, region: int, offset: int, count: int) -> bytes:
        if region == VfioRegion.CONFIG:
            config = bytearray(256)
            config[0x04], config[0x34] = self.command, 0x40
            for position, capability in zip((0x40, 0x50), self._capabilities, strict=False):
                config[position : position + len(capability)] = capability
            return bytes(config[offset : offset + count])
        assert region == BAR
        if offset == COMMON + QUEUE_NOTIF_CONFIG_DATA:
            return (0x100 + self.common.state.queue_select).to_bytes(count, "little")
        return self.common.read(offset - COMMON, count)

    def write(self, region: int, offset: int, data: bytes) -> None:
        if region == BAR and offset < NOTIFY:
            self.common.write_untrusted(offset - COMMON, data)
        else:
            assert len(data) == 2
            self.written.append((region, offset, int.from_bytes(data, "little")))


def test_each_queue_that_is_enabled_is_kicked() -> None:
    function = Function()
    assert kick_queues(function) == len(ENABLED)
    assert function.written == KICKS
    state = function.common.state
    assert (state.queue_select, state.driver_feature_select) == (3, 0), "as its driver left them"
    assert state.status == UP


def test_a_queue_may_be_kicked_by_another_number() -> None:
    function = Function(BASIC | Feature.NOTIF_CONFIG_DATA.mask)
    assert kick_queues(function) == len(ENABLED)
    assert [value for _, _, value in function.written] == [0x100 + index for index in ENABLED]


def test_a_driver_that_says_more_with_its_kicks(caplog: pytest.LogCaptureFixture) -> None:
    function = Function(BASIC | Feature.NOTIFICATION_DATA.mask)
    assert kick_queues(function) == 0
    assert function.written == []
    assert "vf: its queues cannot be kicked, as its driver uses NOTIFICATION_DATA" in caplog.text


def test_a_queue_that_is_kicked_nowhere() -> None:
    function = Function(notify_length=MULTIPLIER * ENABLED[-1])
    assert kick_queues(function) == 2
    assert function.written == KICKS[:2]


@pytest.mark.parametrize(
    "change",
    [
        lambda function: setattr(function, "command", 0),
        lambda function: setattr(function, "_capabilities", ()),
        lambda function: setattr(function, "_capabilities", function._capabilities[:1]),
        lambda function: setattr(function.common.state, "status", Status.ACKNOWLEDGE),
        lambda function: setattr(function.common.state, "status", 0xFF),
    ],
    ids=["no memory", "no structures", "no notifications", "no driver", "gone"],
)
def test_what_has_no_queues_to_kick(change: Callable[[Function], None]) -> None:
    function = Function()
    change(function)
    assert kick_queues(function) == 0
    assert function.written == []


# --- the whole function, over the model kernel ----------------------------------------------------


async def test_interrupts_of_the_function_are_sent(model: ModelKernel) -> None:
    """All that are armed, and none that tells of errors or is the kernel's."""
    function = VfFunction(model.open())
    async with served(function) as client:
        function.replay()
        assert model.acts == []
        eventfd = os.eventfd(0)
        for index in (VfioIrq.MSIX, VfioIrq.REQ):
            await client.set_irqs(IrqRequest(index, 0, 1, ARMED, eventfds=(eventfd,)))
        function.replay()
        assert model.acts == [(0x21, VfioIrq.MSIX, 0, VECTORS)]
        await client.set_irqs(IrqRequest(VfioIrq.MSIX, 0, 0, ARMED))
        await client.set_irqs(IrqRequest(VfioIrq.INTX, 0, 1, ARMED, eventfds=(eventfd,)))
        function.replay()
        assert model.acts[1:] == [(0x21, VfioIrq.INTX, 0, 1)]
        model.refuse[DeviceIoctl.SET_IRQS] = errno.EIO
        with pytest.raises(ClientError) as caught:
            function.replay()
        assert caught.value.errno == errno.EIO
        del model.refuse[DeviceIoctl.SET_IRQS]
        os.close(eventfd)
    function.close()


async def test_a_function_that_has_gone_is_not_woken(model: ModelKernel) -> None:
    function = VfFunction(model.open())
    function._gone = "vf: the kernel wants the device back"
    with pytest.raises(ClientError, match="wants the device back"):
        function.replay()
    function.close()
