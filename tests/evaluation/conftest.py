"""Tiny models of every family, as the training tests have them."""

from typing import Any

from tests.training.conftest import MODELS, media, served, tiny_family

__all__ = ["media", "served", "tiny_family"]


def pytest_generate_tests(metafunc: Any) -> None:
    if "family_name" in metafunc.fixturenames:
        metafunc.parametrize("family_name", list(MODELS))
