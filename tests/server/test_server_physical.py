"""Physical VFs in the configuration and on the command line."""

from __future__ import annotations

import argparse
import tomllib
import uuid
from typing import Final

import pytest

from vfio_user_virtio.backends.vfio.opening import Way
from vfio_user_virtio.backends.vfio.physical import VfConfig
from vfio_user_virtio.backends.vfio.sysfs import PciAddress
from vfio_user_virtio.errors import ConfigError, HostError
from vfio_user_virtio.migration.states import EVERYTHING, VFIO_USER
from vfio_user_virtio_server import serve
from vfio_user_virtio_server.config import SocketPath, parse_document
from vfio_user_virtio_server.physical_config import PhysicalOwnerConfig

PF: Final = PciAddress.parse("0000:03:00.0")
VF: Final = PciAddress.parse("0000:03:00.2")
TOKEN: Final = uuid.UUID("12345678-9abc-def0-1234-56789abcdef0")


def parsed(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    return parser.parse_args(arguments)


def parse(text: str) -> tuple[object, ...]:
    return parse_document(tomllib.loads(text), "file.toml", seed=b"host")


def one(text: str) -> PhysicalOwnerConfig:
    (owner,) = parse(text)
    assert isinstance(owner, PhysicalOwnerConfig)
    return owner


def of_options(*arguments: str) -> PhysicalOwnerConfig:
    (owner,) = serve.configuration_of(parsed(*arguments)).owners
    assert isinstance(owner, PhysicalOwnerConfig)
    return owner


WHOLE: Final = f"""
[[physical]]
name = "red"
pf = "{PF}"
num_vfs = 4
vf_token = "{TOKEN}"
way = "group"
p2p = false
unsafe_noiommu = true

[[physical.vf]]
name = "vm2"
address = "03:00.2"
member = 2
map_bars = false
legacy = true
socket_path = "/run/vm2.sock"
"""


def test_every_key_arrives() -> None:
    owner = one(WHOLE)
    (served,) = owner.served
    assert owner.name == "red"
    assert served.name == "vm2"
    assert served.identity == f"VF {VF}"
    assert served.socket == SocketPath("/run/vm2.sock")
    assert served.vf == VfConfig(address=VF, member_id=2, map_bars=False, legacy=True)
    physical = owner.physical
    assert physical.vfs == (served.vf,)
    assert (physical.pf, physical.vf_token, physical.way) == (PF, TOKEN, Way.GROUP)
    assert (physical.states, physical.unsafe_noiommu) == (VFIO_USER, True)
    assert physical.num_vfs == 4


def test_what_is_left_out_has_a_default() -> None:
    owner = one(f'[[physical]]\n[[physical.vf]]\naddress = "{VF}"\n')
    (served,) = owner.served
    assert (owner.name, served.name) == ("physical1", "physical1-1")
    assert served.vf == VfConfig(address=VF)
    physical = owner.physical
    assert (physical.pf, physical.vf_token, physical.way) == (None, None, None)
    assert (physical.states, physical.unsafe_noiommu) == (EVERYTHING, False)


def test_software_and_physical_devices_go_together() -> None:
    software, physical = parse("[[owner]]\n[[owner.member]]\n" + WHOLE)
    assert not isinstance(software, PhysicalOwnerConfig)
    assert isinstance(physical, PhysicalOwnerConfig)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[[physical]]\n", "there are 1 to 255 VFs, not 0"),
        ("[[physical]]\n[[physical.vf]]\n", "is missing"),
        ('[[physical]]\n[[physical.vf]]\naddress = "eth0"\n', "lspci -D"),
        (WHOLE.replace("member = 2", "member = 0"), "1 to 255"),
        (WHOLE.replace('way = "group"', 'way = "door"'), "cdev"),
        (WHOLE.replace(str(TOKEN), "x"), "VF token"),
        (WHOLE.replace("map_bars", "map_bar"), "map_bars"),
        (WHOLE.replace("p2p", "mtu"), "mtu"),
        (WHOLE.replace("num_vfs = 4", "num_vfs = 0"), "1 to 255"),
        (WHOLE.replace(f'pf = "{PF}"\n', ""), "goes with pf"),
        (WHOLE + '[[physical.vf]]\naddress = "03:00.2"\n', "PCI address"),
    ],
)
def test_what_is_wrong_is_named(text: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        parse(text)


def test_every_option_arrives() -> None:
    owner = of_options(
        *("--socket-path", "/run/s", "--vf", "03:00.2", "--pf", str(PF), "--member", "2"),
        *("--vf-token", str(TOKEN), "--way", "cdev", "--no-map-bars", "--unsafe-noiommu"),
        *("--legacy", "--no-p2p"),
    )
    (served,) = owner.served
    assert served.vf == VfConfig(address=VF, member_id=2, map_bars=False, legacy=True)
    physical = owner.physical
    assert (physical.pf, physical.vf_token, physical.way) == (PF, TOKEN, Way.CDEV)
    assert (physical.states, physical.unsafe_noiommu) == (VFIO_USER, True)


def test_options_that_are_left_out() -> None:
    owner = of_options("--vf", str(VF))
    assert owner.vfs[0].vf == VfConfig(address=VF)
    assert owner.physical.states == EVERYTHING


def test_options_of_the_software_model_do_not_go_with_a_vf() -> None:
    with pytest.raises(HostError, match="--mtu is for the software model"):
        of_options("--vf", str(VF), "--mtu", "1500")


@pytest.mark.parametrize("option", ["--pf=03:00.0", "--member=1", "--no-map-bars", "--way=group"])
def test_options_of_a_vf_do_not_go_without(option: str) -> None:
    with pytest.raises(HostError, match="add --vf"):
        serve.configuration_of(parsed(option))


@pytest.mark.parametrize(
    "arguments", [("--vf", "eth0"), ("--way", "door"), ("--member", "0"), ("--vf-token", "x")]
)
def test_wrong_values_are_usage_errors(arguments: tuple[str, str]) -> None:
    with pytest.raises((SystemExit, argparse.ArgumentError)):
        parsed(*arguments)
