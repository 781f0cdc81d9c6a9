"""What became of tests that ran elsewhere, from the JUnit XML that pytest writes.

It names every test, with its traceback if it failed; a protocol of our own was rejected, as pytest
and every tool beside it know this one.
"""

from __future__ import annotations

from xml.etree import ElementTree

import attrs


@attrs.frozen
class Case:
    """What became of one test: "passed", "failed" or "skipped", the text of why, how long."""

    name: str
    outcome: str
    text: str
    seconds: float


def read_cases(xml: str) -> list[Case]:
    """The test cases in pytest's JUnit XML, in the order that they ran.

    A test that fails and whose fixtures then fail too is one case.
    """
    cases = []
    for element in ElementTree.fromstring(xml).iter("testcase"):
        outcome, text = "passed", ""
        for child in element:
            if child.tag in ("failure", "error"):
                outcome = "failed"
                text += f"{child.get('message', '')}\n{child.text or ''}\n"
            elif child.tag == "skipped" and outcome == "passed":
                outcome, text = "skipped", child.get("message", "")
        name = f"{element.get('classname', '').rpartition('.')[2]}::{element.get('name', '')}"
        cases.append(Case(name, outcome, text, float(element.get("time", "0"))))
    return cases
