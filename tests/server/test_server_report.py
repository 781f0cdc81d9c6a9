"""The file of a report: made first, written in the end, whatever became of what it tells of."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

import pytest

from vfio_user_virtio.errors import HostError
from vfio_user_virtio_server import report
from vfio_user_virtio_server.report import Report
from vfio_user_virtio_server.spans import Span

if TYPE_CHECKING:
    from pathlib import Path

WHOLE: Final = Report("a to b", [Span("all", 5.0, 1.0)])


def test_files(tmp_path: Path) -> None:
    report.write(str(tmp_path / "r.svg"), WHOLE)
    assert (tmp_path / "r.svg").read_text().startswith("<svg ")
    report.write(str(tmp_path / "r.html"), WHOLE)
    assert (tmp_path / "r.html").read_text().startswith("<!DOCTYPE")
    report.make(str(tmp_path / "r.html"))
    assert (tmp_path / "r.html").stat().st_size
    for attempt in (report.make, lambda path: report.write(path, WHOLE)):
        with pytest.raises(HostError, match="cannot write the report to /nonexistent") as caught:
            attempt("/nonexistent/r.svg")
        assert caught.value.exit_code == os.EX_CANTCREAT
    assert report.check_path("a.svg") == "a.svg"
    with pytest.raises(ValueError, match=r"ends in \.html or \.svg"):
        report.check_path("a.png")


def drawn(failure: HostError | None) -> Report:
    return Report("a to b", [], failure=str(failure or ""))


def test_what_went_well_is_kept(tmp_path: Path) -> None:
    with report.kept(str(tmp_path / "r.svg"), drawn):
        assert (tmp_path / "r.svg").read_text() == ""
    assert ">a to b</text>" in (tmp_path / "r.svg").read_text()
    with report.kept(None, drawn):
        pass


def test_what_failed_is_kept(tmp_path: Path) -> None:
    with (
        pytest.raises(HostError, match=r"^no luck$"),
        report.kept(str(tmp_path / "r.svg"), drawn),
    ):
        raise HostError("no luck", exit_code=os.EX_CONFIG)
    assert ">no luck</text>" in (tmp_path / "r.svg").read_text()


def test_what_cannot_be_kept(tmp_path: Path) -> None:
    with (
        pytest.raises(HostError, match="cannot write the report"),
        report.kept("/nonexistent/r.svg", drawn),
    ):
        raise AssertionError("it is not begun")
    (tmp_path / "r.svg").symlink_to("/dev/full")
    with pytest.raises(HostError, match=r"cannot write the report to .*: No space left"):
        report.write(str(tmp_path / "r.svg"), WHOLE)
    with (
        pytest.raises(HostError, match=r"^no luck; cannot write the report .*: No space") as caught,
        report.kept(str(tmp_path / "r.svg"), drawn),
    ):
        raise HostError("no luck", exit_code=os.EX_CONFIG)
    assert caught.value.exit_code == os.EX_CONFIG
