"""A processor whose video part is left out saves the rest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoImageProcessor, AutoTokenizer

from tests.encoding.conftest import family


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", "qwen2_5_omni"])
def test_saved_without_a_video_part(name: str, tmp_path: Path) -> None:
    made: Any = family(name).processor
    made.save_pretrained(tmp_path)
    images, tokenizer = (auto.from_pretrained(tmp_path) for auto in (AutoImageProcessor, AutoTokenizer))
    assert images.to_dict() == made.image_processor.to_dict()
    assert tokenizer.get_vocab() == made.tokenizer.get_vocab()
    assert (tmp_path / "chat_template.jinja").read_text("utf-8") == made.chat_template
    assert type(made).__name__ in (tmp_path / "processor_config.json").read_text("utf-8")
