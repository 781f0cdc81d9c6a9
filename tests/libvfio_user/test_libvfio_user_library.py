"""Where the library is looked for, and what is said of one that is not there or does not fit."""

from __future__ import annotations

import os
import re
import subprocess
from typing import TYPE_CHECKING

import pytest

from vfio_user_virtio.libvfio_user import Library, LibraryError, load
from vfio_user_virtio.libvfio_user.declarations import FUNCTIONS
from vfio_user_virtio.libvfio_user.library import VARIABLE, wanted

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


def stub(folder: Path, **answers: str) -> str:
    """The path of a library with all functions; `answers`: what some return, or that they are not
    there (an empty string)."""
    bodies = dict.fromkeys(FUNCTIONS, "0") | {"dma_sg_size": "40", "vfu_create_ctx": "1"} | answers
    source = folder / "stub.c"
    source.write_text(
        "".join(
            f"long {name}(void) {{ return {body}; }}\n" for name, body in bodies.items() if body
        )
    )
    library = folder / "stub.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True)
    return str(library)


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
