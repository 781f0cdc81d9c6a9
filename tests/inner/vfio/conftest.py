"""Tests of VFs that an IOMMU keeps in check and that are cabled to each other outside.

`tests/e2e/test_e2e_inner_host.py` cables them.  Elsewhere nothing is collected here.
"""

from __future__ import annotations

import json
import os

HOST = json.loads(os.environ.get("INNER_HOST", "{}"))

collect_ignore_glob = (
    [] if len(HOST.get("vfs", ())) == 2 and "noiommu" not in HOST["ways"] else ["test_*.py"]
)
