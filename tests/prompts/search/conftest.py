"""The space that is small enough to be searched exhaustively."""

import importlib.util
import sys
from pathlib import Path

import pytest

_SPEC = importlib.util.spec_from_file_location("exhaustive_space", Path(__file__).with_name("exhaustive.py"))
assert _SPEC is not None and _SPEC.loader is not None
_GRID = importlib.util.module_from_spec(_SPEC)
sys.modules["exhaustive_space"] = _GRID
_SPEC.loader.exec_module(_GRID)


@pytest.fixture(scope="session")
def grid():
    return _GRID
