"""Where the library is looked for, and what is said of one that is not there or does not fit."""

from __future__ import annotations

import errno
import os
import re
import subprocess
from typing import TYPE_CHECKING, Final

import attrs
import pytest

from vfio_user_virtio.libvfio_user import Library, LibraryError, LibraryMissing, load
from vfio_user_virtio.libvfio_user import library as module
from vfio_user_virtio.libvfio_user.declarations import FUNCTIONS
from vfio_user_virtio.libvfio_user.library import VARIABLE, wanted
from vfio_user_virtio.protocol.header import (
    ERROR,
    HEADER_SIZE,
    REPLY,
    Command,
    Header,
    encode_header,
)

if TYPE_CHECKING:
    from pathlib import Path


def test_an_option_is_stronger_than_the_variable_and_that_than_the_loader(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(VARIABLE, "/of/the/variable.so")
    assert wanted("/of/the/option.so") == ("/of/the/option.so", "--libvfio-user")
    assert wanted() == ("/of/the/variable.so", "environment variable LIBVFIO_USER")
    monkeypatch.delenv(VARIABLE)
    name, why = wanted()
    assert name == "libvfio-user.so.0"
    assert why == "neither --libvfio-user nor LIBVFIO_USER is given"


def test_a_missing_library_is_told_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "/nowhere/libvfio-user.so")
    with pytest.raises(LibraryError) as caught:
        load()
    assert caught.value.exit_code == os.EX_UNAVAILABLE
    message = str(caught.value)
    assert "LIBVFIO_USER: cannot load library '/nowhere/libvfio-user.so'" in message
    assert "No such file" in message
    assert "install libvfio-user (https://github.com/nutanix/libvfio-user" in message
    assert "find_library" not in message


def test_only_one_that_is_not_installed_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Not so one that was named, that is something else, or that lacks a library of its own."""
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(module, "_NAME", "libnowhere.so.0")
    with pytest.raises(LibraryMissing, match=r"^neither .* given: cannot .* 'libnowhere\.so\.0'"):
        load()

    def is_unfit(path: str | None = None) -> bool:
        with pytest.raises(LibraryError) as caught:
            load(path)
        return caught.type is LibraryError

    assert is_unfit("libnowhere.so.0")
    with monkeypatch.context() as patch:
        patch.setenv(VARIABLE, "libnowhere.so.0")
        assert is_unfit()
    text = tmp_path / "text.so"
    text.write_text("no library")
    monkeypatch.setattr(module, "_NAME", str(text))
    assert is_unfit()
    needed = compiled(tmp_path / "needed.so", "int needed;")
    monkeypatch.setattr(module, "_NAME", str(compiled(tmp_path / "needs.so", "", str(needed))))
    needed.unlink()
    assert is_unfit()


def test_another_library_is_told_as_such() -> None:
    with pytest.raises(LibraryError, match=r"libc\.so\.6 is not libvfio-user"):
        load("libc.so.6")


def test_the_functions_are_all_that_is_declared() -> None:
    assert len(FUNCTIONS) == 33
    assert len(set(FUNCTIONS)) == 33
    assert {"dma_sg_size", "vfu_create_ctx", "vfu_setup_device_dma"} < set(FUNCTIONS)
    assert all(name.isidentifier() for name in FUNCTIONS)


def test_the_real_one_fits(library: Library) -> None:
    assert library.sg_size == 40
    assert load(library.path).limits_dma == library.limits_dma


# --- libraries that are not what they seem: stubs, which answer each function with 0 --------------


def compiled(library: Path, source: str, *needed: str) -> Path:
    """The library, of C, that needs others."""
    file = library.with_suffix(".c")
    file.write_text(source)
    link = ("-Wl,--no-as-needed", *needed)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, file, *link], check=True)
    return library


def stub(folder: Path, source: str = "", **answers: str) -> str:
    """The path of a library with all functions; `answers`: what some return, or that they are not
    in it (an empty string), for then `source` may have them."""
    bodies = dict.fromkeys(FUNCTIONS, "0") | {"dma_sg_size": "40", "vfu_create_ctx": "1"} | answers
    functions = [f"long {name}(void) {{ return {body}; }}" for name, body in bodies.items() if body]
    return str(compiled(folder / "stub.so", "\n".join([source, *functions])))


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        (
            {"vfu_sg_is_mappable": "", "vfu_create_ioeventfd": ""},
            "does not fit: it has no vfu_create_ioeventfd, vfu_sg_is_mappable",
        ),
        ({"dma_sg_size": "0"}, "dma_sg_size() is 0"),
        ({"dma_sg_size": "4096"}, "dma_sg_size() is 4096"),
        ({"vfu_create_ctx": "0"}, "cannot be used: vfu_create_ctx fails with"),
        (
            {"vfu_setup_device_migration_callbacks": "-1"},
            "is too old: it knows no migration callbacks of version 2",
        ),
        ({"vfu_setup_device_dma": "-1"}, "cannot be used: vfu_setup_device_dma fails with"),
        ({"vfu_realize_ctx": "-1"}, "cannot be used: vfu_realize_ctx fails with"),
        ({}, "cannot be used: a first conversation fails with No such file or directory"),
    ],
    ids=["functions", "no size", "great size", "context", "old", "dma", "realize", "silence"],
)
def test_a_library_that_does_not_fit(tmp_path: Path, answers: dict[str, str], message: str) -> None:
    path = stub(tmp_path, **answers)
    with pytest.raises(LibraryError, match=re.escape(message)) as caught:
        load(path)
    assert path in str(caught.value)
    assert "install libvfio-user (https://github.com/nutanix/libvfio-user" in str(caught.value)


ANSWERING: Final = """
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>
static int listener;
static const unsigned char answers[] = {%s};
long vfu_create_ctx(int transport, const char *path)
{
    struct sockaddr_un address = {AF_UNIX};
    strcpy(address.sun_path, path);
    listener = socket(AF_UNIX, SOCK_STREAM, 0);
    bind(listener, (struct sockaddr *)&address, sizeof(address));
    return listen(listener, 1) == 0;
}
long vfu_run_ctx(void)
{
    int client = accept(listener, NULL, NULL);
    write(client, answers, sizeof(answers));
    close(client);
    return close(listener);
}
"""
"""What has the probe's first conversation: it says the same to whatever it is told."""


def answering(folder: Path, *answers: bytes) -> str:
    numbers = ", ".join(map(str, b"".join(answers)))
    return stub(folder, ANSWERING % numbers, vfu_create_ctx="", vfu_run_ctx="")


VERSION: Final = encode_header(Header(1, Command.VERSION, 20, REPLY)) + bytes(4)
MAPPED: Final = Header(2, Command.DMA_MAP, HEADER_SIZE, REPLY)


@pytest.mark.parametrize("refused", [True, False])
def test_whether_regions_are_limited_is_seen_by_the_first_one(
    tmp_path: Path, refused: bool
) -> None:
    answer = attrs.evolve(MAPPED, flags=REPLY | ERROR, error=errno.EINVAL) if refused else MAPPED
    assert load(answering(tmp_path, VERSION, encode_header(answer))).limits_dma is refused


@pytest.mark.parametrize(
    "answers",
    [
        (VERSION,),
        (VERSION, encode_header(MAPPED)[:-1]),
        (VERSION, encode_header(attrs.evolve(MAPPED, command=Command.DEVICE_RESET))),
    ],
    ids=["none", "cut", "to another command"],
)
def test_an_answer_that_is_none(tmp_path: Path, answers: tuple[bytes, ...]) -> None:
    message = "cannot be used: a first conversation fails with Protocol error"
    with pytest.raises(LibraryError, match=message):
        load(answering(tmp_path, *answers))
