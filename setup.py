"""Puts recipes/ and the bundled data into the wheel; everything else is in pyproject.toml."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

SHIPPED = ("recipes", "data/base", "data/omni", "data/scenes", "data/sounds", "data/clips", "data/pairs")


class BuildWithRecipes(build_py):
    """Builds the package and copies what `mmtune init` hands out beside it."""

    def run(self) -> None:
        """Copies the folders after the modules; an editable install reads them from the checkout."""
        super().run()
        if not self.editable_mode:
            for name in SHIPPED:
                shutil.copytree(name, Path(self.build_lib, "mmtune", "shipped", name), dirs_exist_ok=True)


setup(cmdclass={"build_py": BuildWithRecipes})
