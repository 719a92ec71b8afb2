"""build-data on small made sources, on the faults it must name, and on the real files."""

import io
import json
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from mmtune.errors import DataError, IntegrityError, RecipeError
from mmtune.media.load import load_image
from mmtune.prompts.schema import row_to_example
from mmtune.recipe import Recipe
from mmtune.records import Example
from mmtune.stages import build_data as stage
from mmtune.storage import open_split, read_manifest
from mmtune.talk import Talk


def run(recipe: Recipe, **options) -> dict:
    return stage.build_data(recipe, console=Talk(quiet=True), **options)


def rejects(recipe: Recipe) -> list[dict]:
    lines = (recipe.run_dir / "instructions" / "rejects.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines]


def rows_of(recipe: Recipe, split: str = "train") -> list[Example]:
    return [row_to_example(row) for row in open_split(recipe.run_dir / "instructions" / split).to_pylist()]


def jpeg(at: int, size: tuple[int, int] = (32, 24)) -> bytes:
    out = io.BytesIO()
    values = np.random.default_rng(at).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(values).save(out, "JPEG")
    return out.getvalue()


def make_vqa(folder: Path, questions: int, images: int) -> dict:
    """Writes a VQA v2 source and returns its recipe entry."""
    (folder / "img").mkdir(parents=True)
    for at in range(images):
        (folder / "img" / f"{at:012d}.jpg").write_bytes(jpeg(at))
    asked = [{"image_id": at % images, "question": f"what is {at}?", "question_id": at} for at in range(questions)]
    said = [
        {"question_id": at, "multiple_choice_answer": f"a{at % 7}", "answers": [{"answer": f"a{at % 7}"}] * 10}
        for at in range(questions)
    ]
    (folder / "q.json").write_text(json.dumps({"questions": asked}))
    (folder / "a.json").write_text(json.dumps({"annotations": said}))
    return {
        "id": "vqa",
        "reader": "vqa_v2",
        "questions": str(folder / "q.json"),
        "annotations": str(folder / "a.json"),
        "images": str(folder / "img"),
    }


def recipe(tmp_path: Path, *sources: dict, **build) -> Recipe:
    name = build.pop("run", "run")
    return Recipe(run_dir=tmp_path / name, sources=sources, build={"workers": 1, **build})


def chat(folder: Path, rows: list, name: str = "chat.jsonl", **fields) -> dict:
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    (folder / name).write_text(text, "utf-8", errors="surrogatepass")
    return {"id": "chat", "reader": "messages", "path": str(folder / name), **fields}


def turns(question, answer="ok") -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def shown(path: str) -> dict:
    return turns([{"type": "image", "path": path}, {"type": "text", "text": "?"}])


def test_the_folder_is_complete_and_opens_with_datasets(tmp_path: Path):
    made = recipe(tmp_path, make_vqa(tmp_path / "d", 30, 5))
    result = run(made)
    assert result["rows"] == {"train": 30} and result["read"] == 30 and result["rejected"] == 0
    loaded = datasets.load_from_disk(str(tmp_path / "run" / "instructions"))
    assert loaded["train"].num_rows == 30
    manifest = read_manifest(tmp_path / "run" / "instructions", verify=True)
    assert manifest.facts["media_root"] == str(tmp_path / "d" / "img")
    assert manifest.facts["distinct_media"] == 5
    first = rows_of(made)[0]
    assert first.media[0].width == 32 and first.media[0].size_bytes > 100
    assert load_image(manifest.facts["media_root"], first.media[0]).size == (32, 24)
    assert run(made)["cached"] is True
    assert not list((tmp_path / "run").glob(".*tmp*"))


def digest(made: Recipe) -> dict:
    files = read_manifest(made.run_dir / "instructions").files
    return {name: entry["sha256"] for name, entry in files.items() if name.endswith((".arrow", ".jsonl"))}


def test_output_is_the_same_for_any_number_of_workers(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(stage, "CHUNK_ROWS", 16)
    source = make_vqa(tmp_path / "d", 300, 40)
    for at in (3, 17):
        (tmp_path / "d" / "img" / f"{at:012d}.jpg").write_bytes(jpeg(at)[:300])
    (tmp_path / "d" / "img" / f"{30:012d}.jpg").unlink()
    other = chat(tmp_path / "c", [turns(f"q{at}") for at in range(60)], split="val")
    found = []
    for workers in (1, 2, 3):
        made = recipe(tmp_path, source, other, workers=workers, run=f"run{workers}")
        result = run(made)
        assert result["drops"] == {"decode_error": 16, "media_missing": 7}
        found.append(digest(made))
    assert found[0] == found[1] == found[2]
    assert [row.id for row in rows_of(made)] == sorted((row.id for row in rows_of(made)), key=lambda i: int(i[4:]))


def test_each_distinct_medium_is_probed_once(tmp_path: Path, monkeypatch):
    from mmtune.media import known

    probed = []
    probe = known.probe_medium
    monkeypatch.setattr(known, "probe_medium", lambda root, m, limits: probed.append(m.path) or probe(root, m, limits))
    monkeypatch.setattr(stage, "CHUNK_ROWS", 10)
    run(recipe(tmp_path, make_vqa(tmp_path / "d", 100, 25)))
    assert len(probed) == len(set(probed)) == 25


def test_faults_are_named_and_counted(tmp_path: Path):
    folder = tmp_path / "c"
    folder.mkdir()
    (folder / "fine.jpg").write_bytes(jpeg(0))
    (folder / "cut.jpg").write_bytes(jpeg(0, (200, 200))[:3000])
    (folder / "page.jpg").write_text("<html>404</html>")
    (tmp_path / "outside.jpg").write_bytes(jpeg(1))
    (folder / "link.jpg").symlink_to(tmp_path / "outside.jpg")
    rows = [
        shown("fine.jpg"),
        shown("cut.jpg"),
        shown("page.jpg"),
        shown("gone.jpg"),
        shown("../outside.jpg"),
        shown(str(tmp_path / "outside.jpg")),
        shown("link.jpg"),
        shown("http://localhost/x.jpg"),
        turns("q", ""),
        turns("half \ud800"),
        {**turns([{"type": "image"}]), "images": ["fine.jpg", "fine.jpg"]},
        {"messages": "x"},
        '{"messages": [], "messages": []}',
        '{"messages": [{"role": "user", "con',
    ]
    made = recipe(tmp_path, chat(folder, rows))
    result = run(made)
    assert result["rows"] == {"train": 1}
    assert [(line["where"], line["reason"]) for line in rejects(made)] == [
        ("chat.jsonl:2", "decode_error"),
        ("chat.jsonl:3", "decode_error"),
        ("chat.jsonl:4", "media_missing"),
        ("chat.jsonl:5", "path_escape"),
        ("chat.jsonl:6", "path_escape"),
        ("chat.jsonl:7", "path_escape"),
        ("chat.jsonl:8", "url_refused"),
        ("chat.jsonl:9", "empty_answer"),
        ("chat.jsonl:10", "bad_unicode"),
        ("chat.jsonl:11", "media_mismatch"),
        ("chat.jsonl:12", "bad_field"),
        ("chat.jsonl:13", "bad_json"),
        ("chat.jsonl:14", "bad_json"),
    ]
    assert result["read"] == 14 == sum(result["rows"].values()) + result["rejected"]
    assert all(line["detail"] for line in rejects(made))


def test_the_first_row_of_the_commonest_refusal_is_told(tmp_path: Path):
    talk = Talk(quiet=True)
    rows = [turns("a"), {"x": 1}, turns("b", ""), turns("c", " ")]
    stage.build_data(recipe(tmp_path, chat(tmp_path / "c", rows)), console=talk)
    (told,) = [line for line in talk.lines if "were refused" in line]
    assert "3 of 4 rows were refused: " in told and "; the first at chat.jsonl:3: /messages/1: " in told
    assert told.endswith(f"(all in {tmp_path / 'run' / 'instructions' / 'rejects.jsonl'})")


@pytest.mark.parametrize(
    ("build", "rows", "code"),
    [
        ({}, [{**turns("a"), "id": "x"}, {**turns("b"), "id": "x"}], "duplicate_id"),
        ({}, [turns("a", "")], "no_rows"),
        ({}, [], "empty_input"),
        ({"max_drop_fraction": 0.4}, [turns("a"), turns("b", "")], "too_many_drops"),
    ],
)
def test_what_ends_a_build_leaves_nothing(tmp_path: Path, build: dict, rows: list, code: str):
    with pytest.raises(DataError) as error:
        run(recipe(tmp_path, chat(tmp_path / "c", rows), **build))
    assert error.value.code == code and error.value.exit_code == 3 and error.value.hint
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".instructions.lock"]


@pytest.mark.parametrize("most", [1.0, 0.4])
def test_absolute_paths_stay_refused_and_the_way_to_write_them_is_told_and_works(tmp_path: Path, most: float):
    (tmp_path / "c").mkdir()
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "fine.jpg").write_bytes(jpeg(0))
    rows = [shown(str(photos / "fine.jpg")), *([turns("q")] if most < 1 else [])]
    source = {**chat(tmp_path / "c", rows), "images": str(photos)}
    with pytest.raises(DataError, match="not relative to the media root") as error:
        run(recipe(tmp_path, source, max_drop_fraction=most))
    assert "write paths relative to it, or have `columns.strip` cut off" in error.value.hint
    assert run(recipe(tmp_path, {**source, "columns": {"strip": f"{photos}/"}}))["rows"] == {"train": len(rows)}


def test_folders_of_one_id_may_hold_the_same_names(tmp_path: Path):
    for top in ("train", "test"):
        for at, name in enumerate(("cat/1.jpg", "dog/1.jpg")):
            (tmp_path / top / name).parent.mkdir(parents=True)
            (tmp_path / top / name).write_bytes(jpeg(at + 10 * (top == "test")))
    sources = [{"id": "cl", "reader": "folder", "path": str(tmp_path / top), "split": top} for top in ("train", "test")]
    made = recipe(tmp_path, *sources)
    assert run(made)["rows"] == {"train": 2, "test": 2}
    assert [row.id for row in rows_of(made, "test")] == ["cl/test/cat/1.jpg", "cl/test/dog/1.jpg"]
    # One folder is one set of names, into however many splits it is cut.
    parts = [{**sources[0], "part": [0, 0.5]}, {**sources[0], "part": [0.5, 1], "split": "test"}]
    alone = recipe(tmp_path, *parts, run="alone")
    rows = [row.id for split in run(alone)["rows"] for row in rows_of(alone, split)]
    assert sorted(rows) == ["cl/cat/1.jpg", "cl/dog/1.jpg"]
    with pytest.raises(DataError, match="stands twice") as error:
        run(recipe(tmp_path, sources[0], {**sources[0], "split": "test"}, run="again"))
    assert "their sources, ids of their own" in (error.value.hint or "")


def test_dedup_first_keeps_the_first_of_all_sources(tmp_path: Path):
    first = chat(tmp_path / "a", [{**turns("one"), "id": "x"}, turns("other")])
    second = chat(tmp_path / "b", [{**turns("two"), "id": "x"}], split="val")
    third = chat(tmp_path / "b", [turns("val")], name="v.jsonl", split="test")
    made = recipe(tmp_path, first, second, third, dedup="first")
    result = run(made)
    assert result["rows"] == {"train": 2, "test": 1} and result["drops"] == {"duplicate_id": 1}
    assert rows_of(made)[0].messages[0].text == "one"


def test_leakage_is_counted_and_said(tmp_path: Path):
    (tmp_path / "c").mkdir()
    for at in range(3):
        (tmp_path / "c" / f"{at}.jpg").write_bytes(jpeg(at))
    train = chat(tmp_path / "c", [shown("0.jpg"), shown("1.jpg")])
    val = chat(tmp_path / "c", [shown("1.jpg"), shown("2.jpg")], name="v.jsonl", split="val")
    talk = Talk(quiet=True)
    result = stage.build_data(recipe(tmp_path, train, val), console=talk)
    assert result["leakage"] == {"train/val": {"media": 1, "questions": 1}}
    assert any("share 1 media" in line for line in talk.lines)


def test_a_copy_under_another_name_leaks_when_media_are_hashed(tmp_path: Path):
    (tmp_path / "c").mkdir()
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / "c" / name).write_bytes(jpeg(0))
    train = chat(tmp_path / "c", [shown("a.jpg")])
    val = chat(tmp_path / "c", [shown("b.jpg")], name="v.jsonl", split="val")
    assert run(recipe(tmp_path, train, val))["leakage"] == {}
    assert run(recipe(tmp_path, train, val, hash_media=True))["leakage"]["train/val"]["media"] == 1


def test_two_sources_share_one_media_root(tmp_path: Path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.jpg").write_bytes(jpeg(ord(name)))
    sources = [chat(tmp_path / "a", [shown("x.jpg")]), {**chat(tmp_path / "b", [shown("x.jpg")]), "id": "b"}]
    made = recipe(tmp_path, *sources)
    run(made)
    first, second = rows_of(made)
    assert (first.media[0].path, second.media[0].path) == ("a/x.jpg", "b/x.jpg")
    assert first.group != second.group
    root = read_manifest(tmp_path / "run" / "instructions").facts["media_root"]
    assert load_image(root, second.media[0]).size == (32, 24)


def test_embedded_media_do_not_need_their_files(tmp_path: Path):
    source = make_vqa(tmp_path / "d", 10, 5)
    made = recipe(tmp_path, source, media="embed")
    run(made)
    shutil.rmtree(tmp_path / "d")
    for row in rows_of(made):
        assert load_image("/nowhere", row.media[0]).size == (32, 24)


def test_limit_is_a_subset_and_changes_are_noticed(tmp_path: Path):
    made = recipe(tmp_path, make_vqa(tmp_path / "d", 60, 5))
    assert run(made, limit=10)["rows"] == {"train": 10}
    ten = {row.id for row in rows_of(made)}
    assert run(made, limit=30)["rows"] == {"train": 30}
    assert ten < {row.id for row in rows_of(made)}
    assert run(made, limit=30)["cached"]
    # A mended image is a change, although no annotation changed.
    (tmp_path / "d" / "img" / f"{0:012d}.jpg").write_bytes(jpeg(9, (64, 48)))
    assert not run(made, limit=30)["cached"]
    with pytest.raises(IntegrityError):
        (tmp_path / "run" / "instructions" / "train" / "data-00000-of-00001.arrow").write_bytes(b"x")
        read_manifest(tmp_path / "run" / "instructions")


def test_dry_run_writes_nothing(tmp_path: Path):
    made = recipe(tmp_path, make_vqa(tmp_path / "d", 5, 5))
    result = run(made, dry_run=True)
    assert result["dry_run"] and result["sources"][0]["first"] == "first item: vqa/0"
    assert not (tmp_path / "run").exists()


def test_wrong_recipes(tmp_path: Path):
    source = chat(tmp_path / "c", [turns("q")])
    with pytest.raises(RecipeError, match="no sources"):
        run(recipe(tmp_path))
    with pytest.raises(RecipeError, match="no reader"):
        run(recipe(tmp_path, {**source, "reader": "mesages"}))
    with pytest.raises(RecipeError, match="unknown template"):
        run(recipe(tmp_path, {**source, "template": "nice"}))
    with pytest.raises(DataError, match="no folder"):
        run(recipe(tmp_path, {**source, "images": str(tmp_path / "gone")}))
    (tmp_path / "run" / "instructions").mkdir(parents=True)
    (tmp_path / "run" / "instructions" / "mine.txt").write_text("keep")
    with pytest.raises(RecipeError, match="did not make"):
        run(recipe(tmp_path, source))


def test_our_own_folder_is_a_source_again(tmp_path: Path):
    made = recipe(tmp_path, make_vqa(tmp_path / "d", 12, 4), media="embed")
    run(made)
    again = recipe(
        tmp_path,
        {"id": "again", "reader": "hf", "path": str(tmp_path / "run" / "instructions")},
        run="again",
        media="embed",
    )
    assert run(again)["rows"] == {"train": 12}
    for first, second in zip(rows_of(made), rows_of(again), strict=True):
        assert [m.text for m in first.messages] == [m.text for m in second.messages]
        assert first.media[0].data == second.media[0].data


def test_real_files_from_raw_to_rows(tmp_path: Path, shared_datasets: Path):
    at = shared_datasets
    vqa, coco, demo = at / "vqa_v2_subset/with_images", at / "coco_captions_mini", at / "llamafactory_demo"
    easy = {"question": 0, "answer": 1, "image": "images/{2}.png"}
    sources = [
        {
            "id": "vqa",
            "reader": "vqa_v2",
            "questions": str(vqa / "v2_OpenEnded_mscoco_train2014_questions.json"),
            "annotations": str(vqa / "v2_mscoco_train2014_annotations.json"),
            "images": str(vqa / "train2014"),
        },
        {
            "id": "coco",
            "reader": "coco_captions",
            "split": "val",
            "annotations": str(coco / "annotations/captions_val2017.json"),
            "images": str(coco / "val2017"),
        },
        {"id": "chart", "reader": "chartqa", "split": "test", "path": str(at / "chartqa/test_human.json")},
        {
            "id": "easy",
            "reader": "table",
            "split": "test",
            "path": str(at / "easy_vqa/test/questions.json"),
            "columns": easy,
        },
        {
            "id": "v1",
            "reader": "messages",
            "path": str(demo / "v1_multimodal_demo.jsonl"),
            "columns": {"strip": "data/"},
        },
        *(
            {"id": name, "reader": "sharegpt", "path": str(demo / f"{name}.json")}
            for name in ("mllm_demo", "mllm_video_demo", "mllm_audio_demo", "mllm_video_audio_demo")
        ),
        {"id": "glaive", "reader": "sharegpt", "path": str(demo / "glaive_toolcall_en_demo.json")},
        {"id": "think", "reader": "messages", "path": str(demo / "reason_tool_use_demo_50.jsonl")},
        {
            "id": "celeba",
            "reader": "llava",
            "path": str(at / "llava_format_lmms_finetune/celeba_image_train.json"),
            "images": str(at / "llava_format_lmms_finetune/images"),
        },
        {"id": "fsdd", "reader": "folder", "path": str(at / "fsdd/recordings"), "columns": {"label": r"(\d)_"}},
        {"id": "flickr", "reader": "flickr30k", "path": str(at / "flickr30k_captions/results_test.token"), "limit": 20},
    ]
    made = recipe(tmp_path, *sources, workers=2)
    result = run(made)
    assert result["rows"] == {"train": 73 + 24 + 6 + 3 + 3 + 3 + 300 + 50 + 70 + 960, "val": 24, "test": 238 + 3898}
    assert result["drops"] == {"media_missing": 20}
    for split in result["rows"]:
        for row in rows_of(made, split):
            for medium in row.media:
                assert medium.size_bytes and (medium.width or medium.seconds)


def test_questions_that_are_put_into_wordings_are_told_and_how_they_stay_as_they_are(tmp_path: Path, capsys):
    turns = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    asked, talk = make_vqa(tmp_path / "vqa", 20, 2), chat(tmp_path / "chat", [turns])
    named = {**asked, "id": "named", "template": "vqa_plain"}

    def said(*sources: dict, **build) -> str:
        stage.build_data(recipe(tmp_path, *sources, **build), console=Talk())
        return capsys.readouterr().err

    told = said(asked, named, talk)
    assert "build-data: each row of vqa is asked in a wording drawn from a pool; for all in one set build.te" in told
    assert "(template: vqa_plain of a source)" in told

    def questions(source: str) -> set[str]:
        return {row.messages[0].text for row in rows_of(recipe(tmp_path)) if row.source == source}

    # The advice keeps what it says.
    assert (
        questions("named") == {f"what is {at}?" for at in range(20)} and len(questions("vqa") - questions("named")) > 9
    )
    assert "wording" not in said(asked, named, talk, templates="first")
    assert {text.partition("?")[2] for text in questions("vqa")} == {
        "\nAnswer the question using a single word or phrase."
    }
    assert "wording" not in said(named, talk)
