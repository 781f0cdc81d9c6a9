"""What the client may pass as memory, with real memfds, seals, pipes and directories."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import resource
import select
import socket
from typing import TYPE_CHECKING

import pytest

from tests.memory.memory_files import PAGE, guest_mappings, memfd, open_fds, reopened
from vfio_user_virtio import limits
from vfio_user_virtio.device import DmaAccess
from vfio_user_virtio.errors import ClientError
from vfio_user_virtio.memory.mapped_files import MappedFiles

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

READ = DmaAccess.READ
BOTH = DmaAccess.READ | DmaAccess.WRITE


@pytest.fixture(autouse=True)
def nothing_leaks() -> Iterator[None]:
    before = open_fds(), guest_mappings()
    yield
    assert (open_fds(), guest_mappings()) == before


def refusal(
    files: MappedFiles, fd: int, offset: int = 0, size: int = PAGE, access: DmaAccess = BOTH
) -> ClientError:
    """The error of an acquire that must fail; closes `fd`."""
    before = len(files)
    with pytest.raises(ClientError) as caught:
        files.acquire_untrusted(fd, offset, size, access)
    os.close(fd)
    assert len(files) == before
    return caught.value


def test_one_mapping_and_one_fd_per_file() -> None:
    files = MappedFiles()
    fd = memfd(4)
    fds, mappings = open_fds(), guest_mappings()
    held = [files.acquire_untrusted(fd, page * PAGE, PAGE, BOTH) for page in range(4)]
    other = reopened(fd, os.O_RDWR)
    held.append(files.acquire_untrusted(other, 0, 4 * PAGE, BOTH))
    os.close(other)
    assert len({id(file) for file in held}) == 1
    assert (len(files), open_fds(), guest_mappings()) == (1, fds + 1, mappings + 1)
    os.pwrite(fd, b"shared", PAGE)
    assert bytes(held[0].readable[PAGE : PAGE + 6]) == b"shared"
    assert held[0].writable is not None
    held[0].writable[0:2] = b"ok"
    assert os.pread(fd, 2, 0) == b"ok"
    for file in held[1:]:
        files.release(file)
    assert guest_mappings() == mappings + 1
    files.release(held[0])
    assert (len(files), open_fds(), guest_mappings()) == (0, fds, mappings)
    os.close(fd)


def test_a_read_only_mapping_is_one_of_its_own_and_cannot_be_written() -> None:
    files = MappedFiles()
    fd = memfd(1)
    read_only = files.acquire_untrusted(fd, 0, PAGE, READ)
    both = files.acquire_untrusted(fd, 0, PAGE, BOTH)
    assert read_only is not both
    assert read_only.writable is None
    assert read_only.readable.readonly
    assert both.readable.readonly
    with pytest.raises(TypeError):
        read_only.readable[0] = 1
    files.release(read_only)
    files.release(both)
    os.close(fd)


def test_a_view_outlives_the_mapping_and_the_memory_goes_with_the_view() -> None:
    files = MappedFiles()
    fd = memfd(1)
    mappings = guest_mappings()
    file = files.acquire_untrusted(fd, 0, PAGE, BOTH)
    assert file.writable is not None
    view = file.writable[16:32]
    files.release(file)
    assert len(files) == 0
    assert guest_mappings() == mappings + 1
    view[0] = 7
    assert os.pread(fd, 1, 16) == b"\7"
    del file, view
    assert guest_mappings() == mappings
    os.close(fd)


def test_a_file_that_has_grown_is_mapped_again() -> None:
    files = MappedFiles()
    fd = memfd(1, seals=fcntl.F_SEAL_SHRINK)
    small = files.acquire_untrusted(fd, 0, PAGE, BOTH)
    os.ftruncate(fd, 3 * PAGE)
    assert files.acquire_untrusted(fd, 0, PAGE, BOTH) is small
    grown = files.acquire_untrusted(fd, 2 * PAGE, PAGE, BOTH)
    assert (grown.size, small.size, len(files)) == (3 * PAGE, PAGE, 2)
    assert files.acquire_untrusted(fd, 0, PAGE, BOTH) is grown
    files.release(small)
    files.release(small)
    assert len(files) == 1
    assert files.acquire_untrusted(fd, 0, PAGE, BOTH) is grown
    for _ in range(3):
        files.release(grown)
    os.close(fd)


def test_write_access_needs_a_writable_fd() -> None:
    files = MappedFiles()
    fd = memfd(1)
    error = refusal(files, reopened(fd, os.O_RDONLY))
    assert error.errno == errno.EACCES
    assert "O_RDONLY" in str(error)
    assert "O_RDWR" in str(error)
    error = refusal(files, reopened(fd, os.O_WRONLY), access=READ)
    assert error.errno == errno.EACCES
    assert "O_WRONLY" in str(error)
    read_only = reopened(fd, os.O_RDONLY)
    files.release(files.acquire_untrusted(read_only, 0, PAGE, READ))
    os.close(read_only)
    os.close(fd)


def test_a_write_seal_makes_mmap_refuse() -> None:
    fd = memfd(1, seals=fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_WRITE)
    files = MappedFiles()
    files.release(files.acquire_untrusted(fd, 0, PAGE, READ))
    error = refusal(files, fd)
    assert error.errno == errno.EPERM
    assert "cannot be mapped" in str(error)


@pytest.mark.parametrize("allow_unsealed", [False, True])
@pytest.mark.parametrize("kind", ["eventfd", "pipe", "directory", "socket", "epoll"])
def test_what_is_no_file_is_einval(kind: str, *, allow_unsealed: bool) -> None:
    files = MappedFiles(allow_unsealed=allow_unsealed)
    if kind == "pipe":
        fd, other = os.pipe()
        os.close(other)
    elif kind == "socket":
        one, two = socket.socketpair()
        two.close()
        fd = one.detach()
    elif kind == "epoll":
        fd = os.dup((poller := select.epoll()).fileno())
        poller.close()
    else:
        fd = os.eventfd(0) if kind == "eventfd" else os.open("/", os.O_RDONLY)
    error = refusal(files, fd, access=READ)
    assert error.errno == errno.EINVAL
    assert "share=on" in str(error)


def test_a_path_only_fd_is_a_client_error() -> None:
    assert refusal(MappedFiles(), os.open("/", os.O_PATH)).errno == errno.EBADF


def test_the_shrink_seal_is_required(tmp_path: Path) -> None:
    files = MappedFiles()
    error = refusal(files, memfd(1, seals=0))
    assert error.errno == errno.EPERM
    assert "memory-backend-memfd,share=on" in str(error)
    assert refusal(files, memfd(1, seals=fcntl.F_SEAL_GROW)).errno == errno.EPERM
    (tmp_path / "ram").write_bytes(bytes(PAGE))
    assert refusal(files, os.open(tmp_path / "ram", os.O_RDWR)).errno in (
        errno.EINVAL,  # a disk file
        errno.EPERM,  # the temporary directory is a tmpfs
    )


def test_a_trusted_client_may_pass_unsealed_files(tmp_path: Path) -> None:
    files = MappedFiles(allow_unsealed=True)
    (tmp_path / "ram").write_bytes(bytes(PAGE - 1) + b"x")
    for fd in (memfd(1, seals=0), os.open(tmp_path / "ram", os.O_RDWR)):
        files.release(files.acquire_untrusted(fd, 0, PAGE, BOTH))
        os.close(fd)


@pytest.mark.parametrize(
    ("offset", "size"),
    [
        (0, 3 * PAGE),
        (PAGE, 2 * PAGE),
        (2 * PAGE, PAGE),
        (1 << 63, PAGE),
        ((1 << 64) - PAGE, PAGE),
        (0, 1 << 64),
    ],
)
def test_past_the_end_of_the_file_is_einval(offset: int, size: int) -> None:
    error = refusal(MappedFiles(), memfd(2), offset, size)
    assert error.errno == errno.EINVAL
    assert f"{offset:#x}" in str(error)
    assert f"{2 * PAGE:#x} bytes" in str(error)


def test_a_shrunk_unsealed_file_is_refused_though_it_is_mapped() -> None:
    files = MappedFiles(allow_unsealed=True)
    fd = memfd(2, seals=0)
    file = files.acquire_untrusted(fd, 0, 2 * PAGE, BOTH)
    os.ftruncate(fd, PAGE)
    with pytest.raises(ClientError) as caught:
        files.acquire_untrusted(fd, PAGE, PAGE, BOTH)
    assert caught.value.errno == errno.EINVAL
    files.release(file)
    os.close(fd)


@pytest.mark.parametrize("offset", [1, 512, PAGE - 1, PAGE + 8, -PAGE])
def test_an_offset_that_is_not_a_page_is_einval(offset: int) -> None:
    assert refusal(MappedFiles(), memfd(4), offset).errno == errno.EINVAL


def test_the_number_of_files_is_bounded() -> None:
    files = MappedFiles(max_files=2)
    fds = [memfd(1) for _ in range(3)]
    held = [files.acquire_untrusted(fd, 0, PAGE, BOTH) for fd in fds[:2]]
    error = refusal(files, fds.pop())
    assert error.errno == errno.ENOSPC
    assert "limit of 2" in str(error)
    for file, fd in zip(held, fds, strict=True):
        files.release(file)
        os.close(fd)


def test_all_clients_of_an_owner_together_leave_the_process_room_for_mappings() -> None:
    default_max_map_count = 65_530
    assert default_max_map_count - 4_000 > limits.MAX_MEMBERS * limits.MAX_MAPPED_FILES


def test_address_space_is_bounded_however_sparse_the_file() -> None:
    files = MappedFiles()
    fd = os.memfd_create("guest-ram", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, limits.MAX_MAPPED_BYTES + PAGE)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    assert refusal(files, fd).errno == errno.ENOSPC
    fd = os.memfd_create("guest-ram", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, limits.MAX_MAPPED_BYTES)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    held = files.acquire_untrusted(fd, 0, PAGE, BOTH)
    assert refusal(files, memfd(1)).errno == errno.ENOSPC
    files.release(held)
    files.release(files.acquire_untrusted(fd, 0, PAGE, BOTH))
    os.close(fd)


def test_no_address_space_is_a_client_error() -> None:
    files = MappedFiles()
    fd = os.memfd_create("guest-ram", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 1 << 40)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (1 << 39, hard))
    try:
        error = refusal(files, fd)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert error.errno == errno.ENOMEM


def test_a_file_that_shrinks_between_the_checks_and_mmap(monkeypatch: pytest.MonkeyPatch) -> None:
    fd = memfd(2, seals=0)
    real = mmap.mmap

    def shrinking(fileno: int, length: int, *, flags: int, prot: int) -> mmap.mmap:
        os.ftruncate(fileno, PAGE)
        return real(fileno, length, flags=flags, prot=prot)

    monkeypatch.setattr(mmap, "mmap", shrinking)
    error = refusal(MappedFiles(allow_unsealed=True), fd)
    assert error.errno == errno.EINVAL
    assert "shrank" in str(error)


@pytest.mark.parametrize("allow_unsealed", [False, True])
def test_a_closed_fd_is_a_client_error(*, allow_unsealed: bool) -> None:
    fd = memfd(1)
    os.close(fd)
    with pytest.raises(ClientError) as caught:
        MappedFiles(allow_unsealed=allow_unsealed).acquire_untrusted(fd, 0, PAGE, BOTH)
    assert caught.value.errno == errno.EBADF
