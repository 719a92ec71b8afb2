"""A model to a folder."""

from __future__ import annotations

import os
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
