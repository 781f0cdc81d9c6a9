"""Sockets at paths: every kind of thing that may be there already, and who may come in."""

from __future__ import annotations

import contextlib
import errno
import grp
import os
import shutil
import socket
import stat
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.server.server_process import unprivileged
from vfio_user_virtio.errors import HostError
from vfio_user_virtio_server import sockets
from vfio_user_virtio_server.config import SocketPath
from vfio_user_virtio_server.sockets import PathListener, listen_at

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder with a short name: sun_path holds 108 bytes."""
    path = Path(tempfile.mkdtemp(prefix="vuv-"))
    yield path
    shutil.rmtree(path)


@contextlib.contextmanager
def listening(
    path: Path, mode: int | None = None, group: str | None = None
) -> Iterator[PathListener]:
    listener = listen_at(SocketPath(str(path), mode, group))
    try:
        yield listener
    finally:
        listener.close()


def refusal(path: Path, exit_code: int, mode: int | None = None, group: str | None = None) -> str:
    """How listening at `path` is refused; nothing is left behind by it."""
    before = sorted(os.listdir(path.parent)) if path.parent.is_dir() else []
    with pytest.raises(HostError) as caught:
        listen_at(SocketPath(str(path), mode, group))
    assert caught.value.exit_code == exit_code
    assert str(path) in str(caught.value) or group is not None
    assert "\n" not in str(caught.value)
    assert (sorted(os.listdir(path.parent)) if path.parent.is_dir() else []) == before
    return str(caught.value)


def connects(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        return client.connect_ex(str(path)) == 0


def make_stale(path: Path, kind: socket.SocketKind = socket.SOCK_STREAM) -> None:
    with socket.socket(socket.AF_UNIX, kind) as dead:
        dead.bind(str(path))


def test_a_new_socket_comes_and_goes(folder: Path) -> None:
    path = folder / "s"
    with listening(path) as listener:
        assert connects(path)
        assert os.listdir(folder) == ["s"]
        assert not listener.sock.getblocking()
        assert not os.get_inheritable(listener.sock.fileno())
    assert os.listdir(folder) == []


def test_closing_twice_is_closing(folder: Path) -> None:
    with listening(folder / "s") as listener:
        listener.close()
        (folder / "s").touch()
        listener.close()
    assert os.listdir(folder) == ["s"]


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_SEQPACKET])
def test_a_stale_socket_is_replaced(folder: Path, kind: socket.SocketKind) -> None:
    path = folder / "s"
    make_stale(path, kind)
    with listening(path):
        assert connects(path)
        assert os.listdir(folder) == ["s"]
    assert os.listdir(folder) == []


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_SEQPACKET, socket.SOCK_DGRAM])
def test_a_live_socket_is_left_alone(folder: Path, kind: socket.SocketKind) -> None:
    path = folder / "s"
    with socket.socket(socket.AF_UNIX, kind) as alive:
        alive.bind(str(path))
        if kind != socket.SOCK_DGRAM:
            alive.listen()
        inode = path.lstat().st_ino
        assert "alive" in refusal(path, os.EX_UNAVAILABLE)
        assert path.lstat().st_ino == inode


def test_a_live_socket_with_a_full_backlog_is_left_alone(folder: Path) -> None:
    path = folder / "s"
    with socket.socket(socket.AF_UNIX) as alive, contextlib.ExitStack() as clients:
        alive.bind(str(path))
        alive.listen(0)
        while True:
            client = clients.enter_context(socket.socket(socket.AF_UNIX))
            client.setblocking(False)
            if client.connect_ex(str(path)) == errno.EAGAIN:
                break
        assert "alive" in refusal(path, os.EX_UNAVAILABLE)


def test_a_socket_that_may_not_be_asked_is_left_alone(folder: Path) -> None:
    path = folder / "s"
    make_stale(path)
    path.chmod(0)
    folder.chmod(0o777)
    with unprivileged():
        assert "cannot tell" in refusal(path, os.EX_NOPERM)


@pytest.mark.parametrize("kind", ["a file", "a folder", "a pipe", "a symbolic link"])
def test_what_is_no_socket_is_left_alone(folder: Path, kind: str) -> None:
    path = folder / "s"
    match kind:
        case "a file":
            path.write_text("precious")
        case "a folder":
            path.mkdir()
        case "a pipe":
            os.mkfifo(path)
        case _:
            path.symlink_to(folder / "elsewhere")
    before = path.lstat()
    assert f"is {kind}, not a socket" in refusal(path, os.EX_CANTCREAT)
    assert path.lstat().st_ino == before.st_ino


def test_a_link_to_a_stale_socket_is_not_followed(folder: Path) -> None:
    make_stale(folder / "real")
    (folder / "s").symlink_to("real")
    assert "symbolic link" in refusal(folder / "s", os.EX_CANTCREAT)


def test_a_folder_that_is_not_there(folder: Path) -> None:
    assert "make it first" in refusal(folder / "missing" / "s", os.EX_CANTCREAT)
    (folder / "file").touch()
    assert "make it first" in refusal(folder / "file" / "s", os.EX_CANTCREAT)


def test_a_folder_that_may_not_be_written(folder: Path) -> None:
    folder.chmod(0o555)
    try:
        with unprivileged():
            message = refusal(folder / "s", os.EX_NOPERM)
    finally:
        folder.chmod(0o755)
    assert "dr-xr-xr-x" in message


def test_somebody_who_was_faster_wins(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / "s"

    def link_too_late(source: str, target: str) -> None:
        path.touch()
        os.rename(source, folder / "kept")
        monkeypatch.undo()
        os.link(folder / "kept", target)

    monkeypatch.setattr("os.link", link_too_late)
    with pytest.raises(HostError, match="somebody else") as caught:
        listen_at(SocketPath(str(path)))
    assert caught.value.exit_code == os.EX_UNAVAILABLE
    assert stat.S_ISREG(path.lstat().st_mode)


def test_a_path_that_is_no_longer_ours_is_left_alone(folder: Path) -> None:
    path = folder / "s"
    with listening(path):
        path.unlink()
        make_stale(path)
    assert stat.S_ISSOCK(path.lstat().st_mode)


def test_a_path_that_went_away_is_no_error(folder: Path) -> None:
    with listening(folder / "s"):
        (folder / "s").unlink()


def test_the_second_server_leaves_the_first_ones_socket(folder: Path) -> None:
    path = folder / "s"
    with listening(path):
        refusal(path, os.EX_UNAVAILABLE)
        assert connects(path)


@pytest.mark.parametrize("mode", [0o600, 0o660, 0o777, 0o000])
@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_a_mode_is_exact_whatever_the_umask(folder: Path, mode: int, umask: int) -> None:
    before = os.umask(umask)
    try:
        with listening(folder / "s", mode):
            assert stat.S_IMODE((folder / "s").lstat().st_mode) == mode
            assert os.umask(umask) == umask
    finally:
        os.umask(before)


def test_without_a_mode_the_umask_decides(folder: Path) -> None:
    before = os.umask(0o027)
    try:
        with listening(folder / "s"):
            assert stat.S_IMODE((folder / "s").lstat().st_mode) == 0o750
    finally:
        os.umask(before)


def test_a_group_by_name_and_by_number(folder: Path) -> None:
    gid = os.getegid()
    for group in (str(gid), grp.getgrgid(gid).gr_name):
        with listening(folder / "s", 0o660, group):
            assert (folder / "s").lstat().st_gid == gid


def test_a_group_that_is_not_there(folder: Path) -> None:
    assert "no group 'nosuchgroup'" in refusal(folder / "s", os.EX_CONFIG, group="nosuchgroup")


def test_a_group_that_one_is_not_in(folder: Path) -> None:
    folder.chmod(0o777)
    with unprivileged():
        foreign = max([*os.getgroups(), os.getegid()]) + 1
        message = refusal(folder / "s", os.EX_NOPERM, group=str(foreign))
    assert f"group {foreign}" in message


def test_who_may_connect_is_told(folder: Path) -> None:
    with listening(folder / "s", 0o660):
        told = sockets.describe_access(str(folder / "s"))
    assert told.startswith("srw-rw---- ")
    assert told.endswith(f"{folder}/s")
    assert "No such file" in sockets.describe_access(str(folder / "s"))
