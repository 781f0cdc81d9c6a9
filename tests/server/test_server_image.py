"""image show and image diff: what is printed, exit codes, and files that are no streams."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.migration.golden_streams import golden
from tests.server.server_process import COMMAND, environment, run
from vfio_user_virtio.errors import HostError
from vfio_user_virtio.migration.stream import encode_image
from vfio_user_virtio.virtio.common_parts import drv_features_part
from vfio_user_virtio.virtio.part_header import PartType
from vfio_user_virtio.virtio.parts import Part, encode_parts
from vfio_user_virtio_server import image, main

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def streams(tmp_path: Path) -> Path:
    for name in ("image", "pre_copy", "private", "optional", "mandatory"):
        (tmp_path / name).write_bytes(golden(name))
    return tmp_path


def shown(capfd: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    """The exit code and the output of a command without complaints, in this process."""
    code = image.run(main._parser(["image"]).parse_args(["image", *map(str, arguments)]))
    output, errors = capfd.readouterr()
    assert errors == ""
    return code, output


def explained(*arguments: str | Path) -> tuple[int, str, str]:
    """The exit code, the output and the one line of explanation."""
    result = run("image", *arguments)
    (line,) = result.stderr.splitlines()
    return result.returncode, result.stdout, line


def test_show(streams: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code, output = shown(capfd, "show", streams / "private")
    assert code == 0
    assert output.splitlines() == [
        "record 1 at byte 0: image, 17 bytes",
        "    DEVICE_STATUS: ACKNOWLEDGE DRIVER DRIVER_OK FEATURES_OK",
        "record 2 at byte 33: record of vfio-user-virtio, 62 bytes",
        "    guest_offloads: GUEST_CSUM|GUEST_TSO4|GUEST_TSO6",
        "    mac: 52:54:00:12:34:56",
        "    status: LINK_UP|ANNOUNCE",
        "    config_generation: 42",
        "    isr: queue|configuration",
    ]
    _, output = shown(capfd, "show", streams / "optional")
    first, note, *_ = output.splitlines()
    assert first == "record 1 at byte 0: skipped, 5 bytes"
    assert note.startswith("    Note: tag 0x12345678")
    _, output = shown(capfd, "show", streams / "image")
    assert "    DEV_FEATURES (optional): STATUS CTRL_VQ CTRL_RX VERSION_1\n" in output


def test_show_json_has_the_promised_keys(streams: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code, output = shown(capfd, "show", streams / "private", "--json")
    assert code == 0
    told = json.loads(output)
    assert list(told) == ["file", "records", "problem"]
    assert (told["file"], told["problem"]) == (str(streams / "private"), None)
    first, second = told["records"]
    assert list(first) == ["kind", "offset", "size", "tag", "facts", "notes"]
    assert [record["kind"] for record in (first, second)] == ["image", "private"]
    assert first["facts"] == [
        {
            "name": "DEVICE_STATUS",
            "value": ["ACKNOWLEDGE", "DRIVER", "DRIVER_OK", "FEATURES_OK"],
            "optional": False,
            "problem": None,
        }
    ]
    assert {fact["name"]: fact["value"] for fact in second["facts"]}["config_generation"] == "42"


def test_standard_input(streams: Path) -> None:
    with (streams / "image").open("rb") as file:
        result = subprocess.run(
            [*COMMAND, "image", "diff", "-", streams / "image"],
            stdin=file,
            env=environment(),
            capture_output=True,
            check=False,
        )
    assert (result.returncode, result.stdout, result.stderr) == (0, b"", b"")
    code, output, line = explained("diff", "-", "-")
    assert (code, output) == (os.EX_USAGE, "")
    assert "only one" in line


def test_diff(streams: Path, capfd: pytest.CaptureFixture[str]) -> None:
    ours, theirs = streams / "image", streams / "pre_copy"
    code, output = shown(capfd, "diff", ours, theirs)
    assert code == image.DIFFERENT == 1
    assert output.splitlines() == [
        f"--- {ours}",
        f"+++ {theirs}",
        "DEV_FEATURES: - STATUS CTRL_VQ CTRL_RX VERSION_1",
        "CVQ_CFG RX_PROMISC: -on +off",
    ]
    code, output = shown(capfd, "diff", ours, theirs, "--json")
    assert code == 1
    told = json.loads(output)
    assert list(told) == ["ours", "theirs", "differences"]
    assert told["differences"][1] == {
        "name": "CVQ_CFG RX_PROMISC",
        "ours": True,
        "theirs": False,
        "text": "-on +off",
    }


def test_diff_of_the_same(streams: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert shown(capfd, "diff", streams / "private", streams / "private") == (0, "")
    code, output = shown(capfd, "diff", streams / "image", streams / "image", "--json")
    assert code == 0
    assert json.loads(output)["differences"] == []


def test_what_does_not_count_as_a_difference(
    streams: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Records that are skipped, and images before the last one."""
    longer = streams / "longer"
    longer.write_bytes(golden("pre_copy")[:33] + golden("optional")[:37] + golden("image"))
    assert shown(capfd, "diff", longer, streams / "image") == (0, "")


def test_what_could_be_read_comes_before_the_problem(streams: Path) -> None:
    code, output, line = explained("show", streams / "mandatory")
    assert code == os.EX_DATAERR
    assert output.startswith("record 1 at byte 0: image")
    assert f"{streams}/mandatory: a record with tag 0x12345678" in line
    code, output, line = explained("show", "--json", streams / "mandatory")
    assert code == os.EX_DATAERR
    told = json.loads(output)
    assert len(told["records"]) == 1
    assert told["problem"] in line


def test_a_malformed_value(tmp_path: Path) -> None:
    path = tmp_path / "s"
    bad = Part(PartType.DEVICE_STATUS, b"ab")
    path.write_bytes(encode_image(encode_parts([bad, drv_features_part(1)])))
    code, output, line = explained("show", path)
    assert code == os.EX_DATAERR
    assert "values that are malformed: 1" in line
    assert output.splitlines()[1:3] == [
        "    DEVICE_STATUS: 6162",
        "        Problem: DEVICE_STATUS at byte 0: its value has 2 bytes, not 1",
    ]
    assert explained("show", path, "--json")[0] == os.EX_DATAERR


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "no image"),
        (b"\x7fELF", "ends 4 bytes into the header"),
        (b"\xff" * 100, "the limit is 67108864"),
        (golden("image")[:-1], "ends 1 bytes before the end"),
        (golden("image") + b"x", "ends 1 bytes into the header"),
        (encode_image(b"\1" * 20), "in the record at byte 0: DRV_FEATURES at byte 0"),
    ],
)
def test_files_that_are_no_streams(content: bytes, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "s"
    path.write_bytes(content)
    for arguments in (("show", path), ("diff", path, path)):
        code, _, line = explained(*arguments)
        assert code == os.EX_DATAERR
        assert line.startswith(f"vfio-user-virtio: {path}: ")
        assert problem in line


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for path, problem in ((tmp_path / "none", "No such file"), (tmp_path, "Is a directory")):
        for arguments in (("show", path, "--json"), ("diff", path, path)):
            code, output, line = explained(*arguments)
            assert (code, output) == (os.EX_NOINPUT, "")
            assert problem in line


@pytest.mark.parametrize("arguments", [(), ("show",), ("diff", "a"), ("tell", "a")])
def test_usage(arguments: tuple[str, ...]) -> None:
    assert explained(*arguments)[0] == os.EX_USAGE


def test_a_name_that_would_drive_the_terminal(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "a\33[2J", tmp_path / "b\n"
    ours.write_bytes(golden("image"))
    theirs.write_bytes(golden("pre_copy"))
    result = run("image", "diff", ours, theirs)
    assert result.returncode == 1
    assert result.stdout.splitlines()[:2] == [
        f"--- {tmp_path}/a\\x1b[2J",
        f"+++ {tmp_path}/b\\n",
    ]


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200), st.booleans())
def test_anything_ends_in_a_report_or_our_error(content: bytes, framed: bool) -> None:
    stream = encode_image(content + b"\0") if framed else content
    output = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", output)
        patch.setattr(image, "_pieces", lambda path: iter([stream]))
        for action in ("show", "show --json", "diff x"):
            arguments = ["image", *action.split(), "x"]
            try:
                code = image.run(main._parser(["image"]).parse_args(arguments))
            except HostError as error:
                code = error.exit_code
            assert code in (os.EX_OK, os.EX_DATAERR)
    assert output.getvalue().replace("\n", "").isprintable()
