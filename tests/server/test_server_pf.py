"""The owner as a function of its own: configured, served by the daemon, driven over its socket."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

import pytest

from tests.server.server_process import run, served, short_folder
from tests.server.software import software
from vfio_user_virtio.backends.vfio.owner import owned
from vfio_user_virtio.device import FeatureOperation, VfioIrq
from vfio_user_virtio.errors import ConfigError, HostError, RemoteError
from vfio_user_virtio.migration.admin_client import AdminClient
from vfio_user_virtio.migration.parts_owner import PartsOwner
from vfio_user_virtio.transport.client import connect
from vfio_user_virtio_server.config import (
    InheritedSocket,
    ServedPf,
    SocketPath,
    parse_document,
    read_file,
)
from vfio_user_virtio_server.main import _parser
from vfio_user_virtio_server.serve import configuration_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from vfio_user_virtio_server.config import OwnerConfig


@pytest.fixture
def folder() -> Iterator[Path]:
    with short_folder() as path:
        yield path


def parsed(**pf: object) -> OwnerConfig:
    member: dict[str, object] = {"socket_path": "/run/vm.sock"}
    if pf.pop("legacy", False):
        member["legacy"] = True
    document: dict[str, object] = {"owner": [{"name": "blue", "member": [member], "pf": pf}]}
    (owner,) = software(parse_document(document, "a.toml", seed=b"seed"))
    return owner


def test_there_is_no_pf_unless_it_is_asked_for() -> None:
    assert parsed().pf is None
    assert len(parsed().served) == 1


def test_a_pf_has_a_name_an_address_and_a_socket() -> None:
    pf = parsed(socket_path="/run/pf.sock", sr_iov=True).pf
    assert pf is not None
    assert (pf.name, pf.socket) == ("blue-pf", SocketPath("/run/pf.sock"))
    assert pf.function.sr_iov
    assert pf.function.linux_compat
    assert pf.mac == pf.function.mac != parsed().members[0].mac
    owner = parsed(fd_name="pf", name="boss", mac="02:00:00:00:00:99", linux_compat=False)
    assert isinstance(owner.pf, ServedPf)
    assert not owner.pf.function.linux_compat
    assert (owner.pf.name, owner.pf.mac.hex()) == ("boss", "020000000099")
    assert owner.pf.socket == InheritedSocket("pf")
    assert owner.served[-1] is owner.pf


@pytest.mark.parametrize(
    ("pf", "problem"),
    [
        ({"socket_path": "/run/vm.sock"}, "used by member blue-1 .* and by PF blue-pf"),
        ({"socket_path": "/run/p", "name": "blue-1"}, "member name blue-1 is used"),
        ({"socket_path": "/run/p", "uplink": "none"}, "unknown key 'uplink'"),
        ({"socket_path": "/run/p", "sr_iov": 1}, "sr_iov"),
        ({"socket_path": "/run/p", "linux_compat": "yes"}, "linux_compat"),
        ({"socket_path": "/run/p", "legacy": True}, "whose client then has the legacy commands"),
    ],
)
def test_a_pf_that_cannot_be_is_refused(pf: dict[str, object], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        parsed(**pf)


def test_options_describe_a_pf_too(folder: Path) -> None:
    arguments = ["serve", "--socket-path", f"{folder}/vm", "--pf-socket-path", f"{folder}/pf"]
    (owner,) = software(configuration_of(_parser(arguments).parse_args(arguments)).owners)
    assert owner.pf is not None
    assert owner.pf.socket == SocketPath(f"{folder}/pf")
    assert owner.pf.mac != owner.members[0].mac
    arguments = ["serve", "--config", "x", "--pf-socket-path", f"{folder}/pf"]
    with pytest.raises(HostError, match="--pf-socket-path does not go with --config"):
        configuration_of(_parser(arguments).parse_args(arguments))


async def test_the_daemon_serves_a_pf_and_members_that_it_migrates(folder: Path) -> None:
    config = folder / "config.toml"
    config.write_text(
        f"""[[owner]]
        [owner.pf]
        socket_path = "{folder}/pf"
        [[owner.member]]
        socket_path = "{folder}/1"
        [[owner.member]]
        socket_path = "{folder}/2"
        """
    )
    (owner,) = read_file(str(config)).owners
    assert len(owner.served) == 3
    with served("--config", config) as server:
        for _ in range(2):
            async with connect(folder / "pf") as client, owned(client, "pf") as pf:
                parts = PartsOwner(AdminClient(pf))
                assert (await parts.discover()).lack is None
                assert (await client.irq_info(VfioIrq.MSIX)).count == 4
        async with connect(folder / "2") as member:
            with pytest.raises(RemoteError):
                await member.feature(1, FeatureOperation.GET, room=8)
        code, log = server.stop(signal.SIGTERM)
    assert code == 0
    assert "owner1-pf: the driver is ready: VERSION_1 ACCESS_PLATFORM ADMIN_VQ" in log
    assert not (folder / "pf").exists()


def test_probe_shows_a_pf(folder: Path) -> None:
    arguments = ("--socket-path", f"{folder}/vm", "--pf-socket-path", f"{folder}/pf")
    with served(*arguments):
        shown = run("probe", "--socket-path", f"{folder}/pf").stdout
    assert "ADMIN_VQ" in shown
