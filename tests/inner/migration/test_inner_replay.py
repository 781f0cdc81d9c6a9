"""What a physical VF missed is made good by a replay, and a VF that was moved to has one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import pytest
import trio

from tests.backends.member_rig import MAC_A, frame, nothing_comes, ping_pong, receive
from tests.inner.physical_rig import physical_devices, physical_rig, started_guest
from tests.migration.guest_move_network import MAC_HOST
from vfio_user_virtio.backends.vfio.function import VfFunction
from vfio_user_virtio.control.device_control import DeviceControl
from vfio_user_virtio.control.varlink import VarlinkError
from vfio_user_virtio.migration.states import RUNNING, STOP

if TYPE_CHECKING:
    from tests.inner.conftest import InnerFacts

PATIENCE: Final = 15


async def test_a_kick_and_an_interrupt_that_were_lost(
    inner: InnerFacts, best_way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with (
        physical_devices(inner, best_way, ("a", "peer1")) as devices,
        started_guest(devices["a"]) as guest,
        started_guest(devices["peer1"]) as peer,
    ):
        await ping_pong(guest.driver, peer.driver, 1, sender=MAC_A, to=MAC_HOST)
        device = devices["a"]
        control = DeviceControl("vf", device, kind="physical", identity="a")
        assert control.abilities == ["migration", "dirty_log", "replay"]

        async def lose(index: int, next_available: int = 0) -> None:
            await trio.lowlevel.checkpoint()

        with monkeypatch.context() as lossy:
            lossy.setattr(guest.driver.pci, "notify", lose)
            sent = frame(MAC_HOST, MAC_A, b"nobody was told")
            await guest.driver.send(sent)
        assert await nothing_comes(peer.driver)
        interrupt = guest.driver.interrupt(0)
        seen = interrupt.count
        control.replay()
        assert (await receive(peer.driver)).data == sent
        with trio.fail_after(PATIENCE):
            await interrupt.wait(seen)
        await ping_pong(guest.driver, peer.driver, 1, sender=MAC_A, to=MAC_HOST)
        await device.migration.set_state(STOP)
        with pytest.raises(VarlinkError, match="Busy"):
            control.replay()
        await device.migration.set_state(RUNNING)


async def test_a_vf_that_was_moved_to(
    inner: InnerFacts,
    best_way: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    replay = VfFunction.replay
    replayed: list[str] = []

    def noted(function: VfFunction) -> None:
        replay(function)
        replayed.append(function.name)

    monkeypatch.setattr(VfFunction, "replay", noted)
    async with physical_rig(inner, best_way) as made:
        await made.rig.start()
        await made.rig.move()
        await made.rig.move()
        await made.rig.finish()
        assert len(replayed) == len(set(replayed)) == 2, "each VF once, as it was the target"
    assert "waking it up failed" not in caplog.text
