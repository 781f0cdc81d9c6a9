"""Tests inside an inner host whose hardware is ours, and some of QEMU's, in which things go wrong.

`tests/e2e/test_e2e_inner_migration.py` makes it.  Elsewhere nothing is collected here.
"""

from __future__ import annotations

import json
import os

FUNCTIONS = json.loads(os.environ.get("INNER_HOST", "{}")).get("functions", [])

collect_ignore_glob = [] if len(FUNCTIONS) == 7 else ["test_*.py"]
