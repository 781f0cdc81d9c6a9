"""Two guests on one switch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.examples.example_process import environment, processes_of, start_example

if TYPE_CHECKING:
    from pathlib import Path

    from tests.testbed.bed import Bed


@pytest.mark.e2e
@pytest.mark.slow
def test_guests_reach_each_other(bed: Bed, tmp_path: Path) -> None:
    example = start_example(
        "-m", "examples.two_guests", environ=environment(tmp_path, PYTHONPATH="")
    )
    output, _ = example.communicate()
    assert example.returncode == 0, output
    for way in ("left → right", "right → left"):
        assert f"{way}: 5 packets transmitted, 5 packets received" in output
    assert list(tmp_path.iterdir()) == []
    assert processes_of(example.pid) == []
