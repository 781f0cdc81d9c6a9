"""Values on the command line: the grammar of `values` in the form that argparse wants."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

_T = TypeVar("_T")


def argument(grammar: Callable[[str], _T]) -> Callable[[str], _T]:
    """`grammar` for ``type=``: argparse shows a message only of its own kind of exception."""

    def parse(text: str) -> _T:
        try:
            return grammar(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parse
