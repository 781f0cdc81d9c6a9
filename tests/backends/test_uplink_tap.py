"""The TAP uplink in a network namespace of its own, so that the host's network is left alone.

The checks themselves are in tap_checks.py.  A user namespace makes it work for any user who may
open /dev/net/tun; where that is not there, this fails.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_in_a_namespace() -> None:
    checks = Path(__file__).with_name("tap_checks.py")
    assert Path("/dev/net/tun").exists(), "load the kernel module tun"
    done = subprocess.run(
        [
            *("unshare", "--user", "--map-root-user", "--net"),
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(checks)),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout
