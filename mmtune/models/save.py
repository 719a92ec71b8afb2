"""A model to a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def save_model(model: Any, folder: Path, **options: Any) -> None:
    """Writes config and safetensors, in silence: the stage shows its own progress.

    Args:
        model: A transformers or PEFT model.
        folder: Where to.
        options: Of ``save_pretrained``.
    """
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model.save_pretrained(str(folder), **options)
    finally:
        if shown:
            logging.enable_progress_bar()
