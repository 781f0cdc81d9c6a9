"""Finding the mirror of the system's apt, in both of its formats."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.testbed.provision import mirrors

if TYPE_CHECKING:
    from pathlib import Path

DEB822 = """\
# URIs: http://commented.example/debian
Types: deb-src
URIs: http://source.example/debian
Suites: bookworm

Types: deb
Enabled: no
URIs: http://disabled.example/debian

Types: deb deb-src
# A comment between fields.
URIs: http://mirror.example/debian http://second.example/debian/
Suites: bookworm bookworm-updates
Components: main

Types: deb
URIs: http://mirror.example/debian-security
Suites: bookworm-security

Types: deb
URIs: http://vendor.example/packages
Suites: stable
"""

ONE_LINE = """\
# deb http://commented.example/debian bookworm main
deb-src http://source.example/debian bookworm main
deb [arch=amd64 signed-by=/k.gpg] https://mirror.example/debian bookworm main contrib
deb http://security.example/debian-security bookworm-security main
deb mirror+file:/etc/apt/mirrors/debian.list bookworm main
"""


def test_deb822(tmp_path: Path) -> None:
    folder = tmp_path / "sources.list.d"
    folder.mkdir()
    (folder / "debian.sources").write_text(DEB822)
    assert list(mirrors(tmp_path)) == [
        "http://mirror.example/debian",
        "http://second.example/debian/",
    ]


def test_one_line(tmp_path: Path) -> None:
    (tmp_path / "sources.list").write_text(ONE_LINE)
    assert list(mirrors(tmp_path)) == [
        "https://mirror.example/debian",
        "mirror+file:/etc/apt/mirrors/debian.list",
    ]


def test_no_sources(tmp_path: Path) -> None:
    assert list(mirrors(tmp_path)) == []
