"""What is taken for an eventfd."""

from __future__ import annotations

import errno
import os
import tempfile

import pytest

from vfio_user_virtio.errors import ClientError
from vfio_user_virtio.eventfd import check_eventfd_untrusted


def test_an_eventfd_is_made_non_blocking() -> None:
    fd = os.eventfd(0, 0)
    check_eventfd_untrusted(fd)
    assert not os.get_blocking(fd)
    os.close(fd)


@pytest.mark.parametrize("kind", ["pipe", "memfd", "file", "directory", "closed"])
def test_other_fds_are_refused(kind: str) -> None:
    with tempfile.TemporaryDirectory() as directory:
        extra = None
        if kind == "pipe":
            extra, fd = os.pipe()
        elif kind == "memfd":
            fd = os.memfd_create("eventfd")
        elif kind == "file":
            fd = os.open(f"{directory}/anon_inode:[eventfd]", os.O_CREAT | os.O_RDWR)
        else:
            fd = os.open(directory, os.O_RDONLY)
        if kind == "closed":
            os.close(fd)
        with pytest.raises(ClientError, match="eventfd") as caught:
            check_eventfd_untrusted(fd)
        assert caught.value.errno == errno.EINVAL
        if kind != "closed":
            os.close(fd)
        if extra is not None:
            os.close(extra)
