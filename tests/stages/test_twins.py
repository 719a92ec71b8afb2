"""extract.twins: photographs that were saved again are found among others, listed and warned of."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image
from pydantic import ValidationError

from mmtune.errors import DataError
from mmtune.recipe import Recipe
from mmtune.stages.extract import extract
from mmtune.storage import read_manifest
from mmtune.talk import Talk

BASE = Path(__file__).resolve().parents[2] / "data" / "base"


def made(run_dir: Path, places: dict[str, Path], **settings) -> Recipe:
    sources = [
        {"id": "photos", "reader": "folder", "split": split, "path": str(path)} for split, path in places.items()
    ]
    return Recipe(
        run_dir=run_dir,
        model={"path": str(BASE)},
        sources=sources,
        extract={"modalities": ["image"], "tokens": False, "workers": 1, **settings},
    )


def saved_again(photo: Path, folder: Path, way: int) -> Path:
    """Saves a photo at a lower quality, at half its size, or without its edges."""
    image = Image.open(photo).convert("RGB")
    width, height = image.size
    path = folder / f"again-{photo.stem}.{'png' if way == 1 else 'jpg'}"
    if way == 0:
        image.save(path, quality=60)
    elif way == 1:
        image.resize((width // 2, height // 2)).save(path)
    else:
        image.crop((width // 50, height // 50, width - width // 50, height - height // 50)).save(path, quality=80)
    return path


@pytest.fixture
def photos(shared_datasets: Path, tmp_path: Path) -> tuple[dict[str, Path], dict[str, str]]:
    """20 photos to train on; test has 12 others, and three of train saved again, val one that is a copy."""
    files = sorted((shared_datasets / "coco_captions_mini").rglob("*.jpg"))
    places = {split: tmp_path / split for split in ("train", "test", "val")}
    for split, own in (("train", files[:20]), ("test", files[20:32]), ("val", files[32:34])):
        (places[split] / "a").mkdir(parents=True)
        for file in own:
            shutil.copy(file, places[split] / "a")
    twins = {saved_again(files[at], places["test"] / "a", at).name: files[at].name for at in range(3)}
    shutil.copy(files[5], places["val"] / "a" / "copy.jpg")
    return places, {**twins, "copy.jpg": files[5].name}


def test_photos_saved_again_are_the_twins_and_no_others(photos, tmp_path: Path):
    places, twins = photos
    recipe, talk = made(tmp_path / "run", places, twins={"image": 0.99}), Talk(quiet=True)
    result = extract(recipe, console=talk)
    lines = [json.loads(line) for line in (tmp_path / "run/features/twins.jsonl").read_text("utf-8").splitlines()]
    assert {Path(line["id"]).name: Path(line["train"]).name for line in lines} == twins
    assert {line["kind"] for line in lines} == {"image"} and lines[0]["cosine"] >= lines[-1]["cosine"] >= 0.99
    facts = read_manifest(tmp_path / "run/features").facts["twins"]["image"]
    assert facts["splits"] == {"test": {"units": 15, "twins": 3}, "val": {"units": 3, "twins": 1}}
    assert facts["least"] == 0.99 and 0 < facts["median_cosine"] < 0.99
    assert result["twins"] == {"image": facts}
    said = next(line for line in talk.lines if "near twin" in line)
    assert "test 3 of 15, val 1 of 3" in said and "twins.jsonl" in said
    # Another bound looks again, and makes no features anew.
    again = extract(made(tmp_path / "run", places, twins={"image": 0.9999}), console=Talk(quiet=True))
    assert not again["cached"] and again["kept"] == {"image": 38}
    assert again["twins"]["image"]["splits"]["val"] == {"units": 3, "twins": 1}


def test_without_twins_nothing_is_looked_for(photos, tmp_path: Path):
    places, _ = photos
    assert extract(made(tmp_path / "run", places), console=Talk(quiet=True))["twins"] == {}
    assert not (tmp_path / "run/features/twins.jsonl").exists()


@pytest.mark.parametrize(
    ("splits", "said"),
    [
        (("train",), "train alone shows any"),
        (("val",), "train shows none"),
        (("train", "val"), "all that val (3) shows is in train itself, which build-data counts as shared"),
    ],
)
def test_where_there_is_nothing_to_compare_it_is_said_why(photos, tmp_path: Path, splits, said):
    places, _ = photos
    talk = Talk(quiet=True)
    recipe = made(tmp_path / "run", dict.fromkeys(splits, places["val"]), twins={"image": 0.9})
    assert extract(recipe, console=talk)["twins"]["image"]["median_cosine"] is None
    assert any(f"image: {said}, so there is nothing to compare" in line for line in talk.lines)


def test_what_cannot_be_compared_is_refused(photos, tmp_path: Path):
    places, _ = photos
    with pytest.raises(ValidationError, match="twins asks for audio, which modalities leaves out"):
        made(tmp_path / "run", places, twins={"audio": 0.9})
    with pytest.raises(ValidationError, match="less than or equal to 1"):
        made(tmp_path / "run", places, twins={"image": 90})
    with pytest.raises(DataError, match="hold no audio"):
        extract(made(tmp_path / "run", places, modalities=[], twins={"audio": 0.9}), console=Talk(quiet=True))
