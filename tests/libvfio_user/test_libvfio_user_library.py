"""Where the library is looked for, and what is said of one that is not there or does not fit."""

from __future__ import annotations

import os

import pytest

from vfio_user_virtio.libvfio_user import Library, LibraryError, load
from vfio_user_virtio.libvfio_user.declarations import FUNCTIONS
from vfio_user_virtio.libvfio_user.library import VARIABLE, wanted


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
