"""The model kernel as a fixture."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.backends.vfio.model_kernel import install

if TYPE_CHECKING:
    from pathlib import Path

    from tests.backends.vfio.model_kernel import ModelKernel


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModelKernel:
    """A kernel with one function that is bound to vfio-pci; see `model_kernel`."""
    return install(tmp_path, monkeypatch)
