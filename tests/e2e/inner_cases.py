"""Tests that ran inside an inner host, told outside: each is a subtest, under its own name."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from tests.testbed.inner_results import Case


def report_cases(cases: Sequence[Case], ways: Iterable[str], subtests: pytest.Subtests) -> None:
    """Fails with the tracebacks from inside; every one of `ways` into VFIO must have been tried.

    A test inside that is skipped fails too: the host is made for the tests.
    """
    for way in ways:
        assert any(f"[{way}]" in case.name for case in cases), f"no test inside ran by {way}"
    for case in cases:
        with subtests.test(case.name):
            if case.outcome != "passed":
                pytest.fail(f"{case.outcome}: {case.text}", pytrace=False)
