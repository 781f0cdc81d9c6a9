"""The test protocol that is added to a running QEMU, and what is left of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.server.vm.bare_qemu import bare_qemu
from tests.testbed.relay import forwarding
from vfio_user_virtio_server.migrate_vm import parse_forwarded
from vfio_user_virtio_server.vm.errors import QemuError
from vfio_user_virtio_server.vm.qemu import Qemu
from vfio_user_virtio_server.vm.qtest import (
    Forwarded,
    open_qtest,
    remove_socket_untrusted,
    socket_untrusted,
)

if TYPE_CHECKING:
    from tests.testbed.bed import Bed


@pytest.mark.slow
async def test_its_socket_is_found_again_and_goes_with_its_qemu(bed: Bed) -> None:
    async with bare_qemu(bed) as qmp:
        assert await socket_untrusted(qmp) is None
        for _ in range(2):
            async with open_qtest(qmp) as qtest:
                assert await qtest.ask(["inl 0xcf8"]) == [0]
        path = await socket_untrusted(qmp)
        assert path is not None
        await Qemu(qmp).quit()
    assert not Path(path).parent.exists()


@pytest.mark.slow
async def test_on_another_host_it_is_at_a_path_of_that(bed: Bed, tmp_path: Path) -> None:
    near, far = tmp_path / "near", tmp_path / "far"
    async with bare_qemu(bed) as qmp, forwarding({near: far}):
        for _ in range(2):
            async with open_qtest(qmp, Forwarded(str(near), str(far))) as qtest:
                assert await qtest.ask(["inl 0xcf8"]) == [0]
        assert await socket_untrusted(qmp) == str(far)
        with pytest.raises(QemuError, match=f"at {far} of its host already: forward"):
            async with open_qtest(qmp, Forwarded(str(near), "/run/qtest")):
                pass


def test_where_it_is_forwarded() -> None:
    assert parse_forwarded("near:/run/far") == Forwarded("near", "/run/far")
    for text in ("near", "near:far", ":/run/far", "near:"):
        with pytest.raises(ValueError, match="is not HERE:THERE"):
            parse_forwarded(text)


def test_nothing_else_is_removed(tmp_path: Path) -> None:
    other = tmp_path / "socket"
    other.touch()
    remove_socket_untrusted(str(other))
    assert other.exists()
