"""The golden streams beside this file, as bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Final

FOLDER: Final = Path(__file__).with_name("golden")
NAMES: Final = sorted(path.stem for path in FOLDER.glob("*.hex"))


def golden(name: str) -> bytes:
    lines = (FOLDER / f"{name}.hex").read_text().splitlines()
    return bytes.fromhex("".join(line.partition("#")[0] for line in lines))
