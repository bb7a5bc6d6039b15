"""The exported tiny network, made once for a session."""

from __future__ import annotations

import pytest

from compress.model import Model
from compress.testing import tiny_exported


@pytest.fixture
def exported() -> Model:
    """A copy of the exported tiny network that a test may change."""
    return tiny_exported(21)
