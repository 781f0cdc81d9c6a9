"""Outcomes of tests that ran in another pytest, which writes the XML here as it does inside."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

from tests.testbed.inner_results import read_cases

if TYPE_CHECKING:
    from pathlib import Path

TESTS = """\
import pytest

@pytest.fixture
def broken():
    yield
    raise OSError("at the end")

@pytest.mark.parametrize("way", ["group", "cdev"])
def test_passes(way): pass

def test_fails(): assert 1 == 2

def test_fails_at_its_end(broken): pass

def test_is_skipped(): pytest.skip("no reason")
"""


def test_every_outcome(tmp_path: Path) -> None:
    file = tmp_path / "test_others.py"
    file.write_text(TESTS)
    options = ("-p", "no:cacheprovider", "-c", "/dev/null", "--junitxml=results.xml")
    subprocess.run(
        [sys.executable, "-m", "pytest", *options, file.name],
        cwd=tmp_path,
        check=False,
        capture_output=True,
    )
    cases = {case.name: case for case in read_cases((tmp_path / "results.xml").read_text())}
    assert {name: case.outcome for name, case in cases.items()} == {
        "test_others::test_passes[group]": "passed",
        "test_others::test_passes[cdev]": "passed",
        "test_others::test_fails": "failed",
        "test_others::test_fails_at_its_end": "failed",
        "test_others::test_is_skipped": "skipped",
    }
    assert "assert 1 == 2" in cases["test_others::test_fails"].text
    assert "at the end" in cases["test_others::test_fails_at_its_end"].text
    assert cases["test_others::test_is_skipped"].text == "no reason"
