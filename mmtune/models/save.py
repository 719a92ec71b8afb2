"""A model to a folder."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any


def save_model(model: Any, folder: Path, **options: Any) -> None:
    """Writes config and safetensors, in silence: the stage shows its own progress.

    Args:
        model: A transformers or PEFT model.
        folder: Where to.
        options: Of ``save_pretrained``.
    """
    import torch
    from transformers.utils import logging

    # Where DeepSpeed is installed, saving imports it, to ask whether the model is one of its own; it then warns that it
    # finds no accelerator, unless it is told so.
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model.save_pretrained(str(folder), **options)
    finally:
        if shown:
            logging.enable_progress_bar()
    _share(folder)
    _sort_sets(folder, model)


def _share(folder: Path) -> None:
    """Gives weights the rights of the config beside them.

    safetensors writes them for their owner alone; a server that runs as somebody else could not read them.
    """
    config = next(folder.glob("*config.json"), None)
    if config is not None:
        for weights in folder.glob("*.safetensors"):
            weights.chmod(stat.S_IMODE(config.stat().st_mode))


def _sort_sets(folder: Path, model: Any) -> None:
    """Puts the names of modules in an adapter's config into order; PEFT writes them as a set happens to lie."""
    file = folder / "adapter_config.json"
    configs = getattr(model, "peft_config", {}).values()
    names = {name for config in configs for name, value in vars(config).items() if isinstance(value, set)}
    if names and file.is_file():
        config = json.loads(file.read_text("utf-8"))
        in_order = {name: sorted(config[name]) for name in names if config.get(name)}
        file.write_text(json.dumps({**config, **in_order}, indent=2, sort_keys=True), "utf-8")
