"""``python -m vfio_user_virtio_server``: the same as the installed command."""

from __future__ import annotations

import sys

from vfio_user_virtio_server.main import main

sys.exit(main())
