"""The control interface under the program that administrators have: systemd's varlinkctl."""

from __future__ import annotations

import json
import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.server.server_process import SECONDS, client, served, short_folder
from tests.testbed import varlinkctl
from vfio_user_virtio.control.interface import CONTROL, INTERFACES

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(scope="module")
def command() -> list[str]:
    try:
        return varlinkctl.find()
    except varlinkctl.VarlinkctlMissing as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with (
        short_folder() as path,
        served("--socket-path", path / "s", "--control-path", path / "c"),
    ):
        yield path


def run(command: list[str], *arguments: str | Path) -> str:
    done = subprocess.run(
        [*command, *map(str, arguments)],
        check=False,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_info(command: list[str], folder: Path) -> None:
    shown = run(command, "info", folder / "c")
    assert "Vendor: vfio-user-virtio" in shown
    assert CONTROL.name in shown
    assert run(command, "list-interfaces", folder / "c").split() == sorted(INTERFACES)


@pytest.mark.parametrize("name", INTERFACES)
def test_introspection(command: list[str], folder: Path, name: str) -> None:
    """It parses the text and prints what it understood: every member is there."""
    shown = run(command, "introspect", folder / "c", name)
    interface = INTERFACES[name]
    assert f"interface {name}\n" in shown
    for kind, members in (
        ("type", interface.types),
        ("method", interface.methods),
        ("error", interface.errors),
    ):
        for member in members:
            assert f"\n{kind} {member}" in shown
    (folder / "text").write_text(interface.text)
    run(command, "validate-idl", folder / "text")


def test_calls(command: list[str], folder: Path) -> None:
    def call(method: str, parameters: object, *options: str) -> list[dict[str, object]]:
        address = f"{CONTROL.name}.{method}"
        shown = run(
            command, "call", "--json=short", *options, folder / "c", address, json.dumps(parameters)
        )
        decoder, found, position = json.JSONDecoder(), [], 0
        while (rest := shown[position:].lstrip("\x1e\n ")) != "":
            value, size = decoder.raw_decode(rest)
            found.append(value)
            position = len(shown) - len(rest) + size
        return found

    (reply,) = call("GetDevices", {})
    assert isinstance(reply["devices"], list)
    assert reply["devices"][0]["name"] == "device"
    call("Quiesce", {"device": "device", "keep": True})
    (reply,) = call("GetDevice", {"device": "device"})
    assert isinstance(reply["device"], dict)
    assert reply["device"]["migration"]["state"] == "STOP"
    call("SetMigrationState", {"device": "device", "state": "STOP_COPY"})
    first, last = call("ReadImage", {"device": "device"}, "--more")
    assert isinstance(first["data"], str)
    assert len(first["data"]) > 100
    assert last == {"data": ""}
    call("Resume", {"device": "device"}, "--oneway")
    with client(folder / "s"):
        assert call("GetMappings", {"device": "device"}, "--more") == [{"mappings": []}]
    (reply,) = call("GetStatistics", {})
    assert isinstance(reply["statistics"], list)


@pytest.mark.parametrize(
    ("method", "parameters", "error"),
    [
        ("GetDevice", {"device": "other"}, "DeviceNotFound"),
        ("GetDevice", {}, "Invalid"),
        ("GetMappings", {"device": "device"}, "ExpectedMore"),
        ("Nothing", {}, "MethodNotFound"),
    ],
)
def test_errors_are_shown(
    command: list[str], folder: Path, method: str, parameters: object, error: str
) -> None:
    address = f"{CONTROL.name}.{method}"
    done = subprocess.run(
        [*command, "call", str(folder / "c"), address, json.dumps(parameters)],
        check=False,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode != 0
    assert error in done.stderr
