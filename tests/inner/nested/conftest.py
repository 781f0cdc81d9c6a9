"""A QEMU inside the inner host, on a VF served there; `tests/e2e/test_e2e_inner_qemu.py` runs it.

Elsewhere nothing is collected here.
"""

from __future__ import annotations

import os

collect_ignore_glob = [] if os.environ.get("NESTED") else ["test_*.py"]
