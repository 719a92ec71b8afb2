"""What a processor takes with it when it is saved, its pixel budget, and its fingerprint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer

from mmtune.encoding.processor import load_processor, processor_fingerprint, same_processor
from mmtune.errors import IntegrityError, RecipeError
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


def test_a_pixel_budget_sets_how_many_tokens_an_image_takes(tmp_path: Path) -> None:
    family("qwen2_5_vl").processor.save_pretrained(tmp_path)
    (tmp_path / "video_preprocessor_config.json").write_text('{"video_processor_type": "Qwen2VLVideoProcessor"}')

    def patches(size: tuple[int, int], **budget: int) -> int:
        images = load_processor(str(tmp_path), offline=True, **budget).image_processor
        (grid,) = images(images=[Image.new("RGB", size)])["image_grid_thw"]
        return int(grid.prod())

    # A patch is of 14 x 14 pixels.
    assert patches((56, 56)) * 196 <= 10_000 < patches((56, 56), min_image_pixels=10_000) * 196
    assert patches((560, 560)) * 196 > 10_000 >= patches((560, 560), max_image_pixels=10_000) * 196
    with pytest.raises(RecipeError, match="over the largest"):
        load_processor(str(tmp_path), offline=True, min_image_pixels=200, max_image_pixels=100)


def test_a_budget_where_images_have_none(tmp_path: Path) -> None:
    family("llava").processor.save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match="no pixel budget"):
        load_processor(str(tmp_path), offline=True, min_image_pixels=200)


def test_a_processor_that_changed_since_tokens_were_made(tmp_path: Path) -> None:
    family("llava").processor.save_pretrained(tmp_path)
    made = processor_fingerprint(load_processor(str(tmp_path), offline=True))
    assert processor_fingerprint(same_processor(str(tmp_path), made, offline=True)) == made
    template = tmp_path / "chat_template.jinja"
    template.write_text("{# another #}" + template.read_text("utf-8"), "utf-8")
    with pytest.raises(IntegrityError, match="tokens/ was made with"):
        same_processor(str(tmp_path), made, offline=True)
