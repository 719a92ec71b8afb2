"""extract.reduce and extract.joint on real digits: PCA is scikit-learn's, the autoencoder reaches it, rows join."""

import json
import re
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA

from mmtune.errors import DataError, RecipeError
from mmtune.features.index import open_index
from mmtune.features.neighbours import nearest
from mmtune.features.reduction import standardized
from mmtune.features.table import open_features
from mmtune.recipe import Extract, Recipe
from mmtune.stages.extract import extract, filling
from mmtune.stages.show import describe, render
from mmtune.talk import Talk

REPOSITORY = Path(__file__).resolve().parents[2]
BASE = str(REPOSITORY / "data" / "base")
PIXELS = {"hidden_size": 32, "image_size": 8, "patch_size": 2, "num_hidden_layers": 1}
COUNTS = {"train": 300, "test": 100}
DIGITS = load_digits()


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    """Scans of digits as files, the label first, and a row of picture and words for each."""
    folder = tmp_path_factory.mktemp("digits")
    start = 0
    for split, count in COUNTS.items():
        (folder / split).mkdir()
        lines = []
        for at in range(start, start + count):
            name = f"{DIGITS.target[at]}_{at:04}.png"
            Image.fromarray((DIGITS.images[at] * 15.9).astype(np.uint8)).save(folder / split / name)
            words = f"row {at % 37}: the scan of a {'even' if DIGITS.target[at] % 2 == 0 else 'odd'} number"
            lines.append(json.dumps({"q": words, "a": str(DIGITS.target[at]), "image": f"{split}/{name}"}))
        (folder / f"{split}.jsonl").write_text("\n".join(lines))
        start += count
    return folder


def pictures(digits: Path, run_dir: Path, *, splits=tuple(COUNTS), **settings) -> Recipe:
    sources = [
        {"id": split, "reader": "folder", "split": split, "path": str(digits / split), "columns": {"label": r"(\d)_"}}
        for split in splits
    ]
    keys = {"encoders": {"image": {"config": PIXELS}}, "workers": 1, "dtype": "fp32", **settings}
    return Recipe(run_dir=run_dir, sources=sources, extract=keys)


def rows(digits: Path, run_dir: Path, **settings) -> Recipe:
    columns = {"question": "q", "answer": "a", "image": "image"}
    sources = [
        {"id": split, "reader": "table", "split": split, "path": str(digits / f"{split}.jsonl"), "images": str(digits),
         "columns": columns} for split in COUNTS
    ]  # fmt: skip
    keys = {"joint": ["image", "text"], "workers": 1, **settings}
    return Recipe(run_dir=run_dir, model={"path": BASE}, sources=sources, extract=keys)


def run(asked: Recipe, **options) -> tuple[dict, Path]:
    result = extract(asked, console=Talk(quiet=True), **options)
    out = asked.run_dir / "features"
    facts = json.loads((out / "manifest.json").read_text())["facts"]
    assert result["reduced"] == facts["reduced"]
    return {**result, **facts}, out


def of_train(table) -> np.ndarray:
    return np.array(["train" in own for own in table.table.column("splits").to_pylist()])


def test_pca_is_that_of_scikit_learn_and_the_index_holds_its_codes(digits, tmp_path):
    facts, out = run(pictures(digits, tmp_path / "run", reduce={"width": 8}))
    table = open_features(out, "image")
    train, pooled = of_train(table), table.pooled().astype(np.float64)
    assert train.sum() == COUNTS["train"] and len(train) == sum(COUNTS.values())
    pca = PCA(8, svd_solver="full").fit(pooled[train])
    spread = np.sqrt(np.square(pooled[train] - pooled[train].mean(0)).sum(1).mean())
    codes = table.compared()
    assert codes.shape == (len(pooled), 8) and codes.dtype == np.float32
    np.testing.assert_allclose(np.abs(codes), np.abs(pca.transform(pooled)) / spread, atol=1e-5)
    found = facts["reduced"]["image"]
    assert found["lost"]["train"] == pytest.approx(1 - pca.explained_variance_ratio_.sum(), abs=1e-5)
    other = pooled[~train]
    off = np.square(other - pca.inverse_transform(pca.transform(other))).sum()
    wanted = off / np.square(other - pca.mean_).sum()
    assert found["lost"]["held_out"] == pytest.approx(wanted, abs=1e-5)
    assert found["of"] == {"image": 32} and found["rows"] == {"train": 300, "held_out": 100}
    assert datasets.load_from_disk(str(out))["image"].column_names[-2:] == ["pooled", "reduced"]
    index = open_index(out / "index" / "image")
    assert index.facts.width == 8 and index.facts.source != facts["fingerprints"]["image"]
    np.testing.assert_array_equal(index.search(codes, 3)[0], nearest(codes, codes, 3)[0])


def test_the_linear_autoencoder_reaches_pca_and_a_hidden_layer_goes_below(digits, tmp_path):
    asked = {"method": "autoencoder", "width": 8}
    facts, out = run(rows(digits, tmp_path / "run", reduce=asked))
    for name in ("image", "text", "joint"):
        own = facts["reduced"][name]
        assert own["lost_by_pca"]["train"] - 1e-5 <= own["lost"]["train"] <= 1.01 * own["lost_by_pca"]["train"], name
    assert set(own["lost"]["kinds"]) == {"image", "text"} and own["of"] == {"image": 128, "text": 128}
    before = (out / "joint" / "data-00000-of-00001.arrow").read_bytes()
    run(rows(digits, tmp_path / "run", reduce=asked), force=True)
    assert (out / "joint" / "data-00000-of-00001.arrow").read_bytes() == before
    bent, _ = run(rows(digits, tmp_path / "run", reduce={**asked, "hidden": 64, "of": ["image"]}))
    assert list(bent["reduced"]) == ["image"]
    assert bent["reduced"]["image"]["lost"]["train"] < 0.9 * own["lost_by_pca"]["kinds"]["image"]["train"]


def test_another_reduction_opens_no_file(digits, tmp_path, monkeypatch):
    _, out = run(pictures(digits, tmp_path / "run"))
    plain = (out / "image" / "data-00000-of-00001.arrow").read_bytes()

    def opened(*_):
        raise AssertionError("a file was opened")

    monkeypatch.setattr(filling.Preparer, "_one", opened)
    monkeypatch.setattr(filling, "file_sha256", opened)
    pooled = open_features(out, "image").pooled()
    for width in (4, 6):
        result, _ = run(pictures(digits, tmp_path / "run", reduce={"width": width}))
        table = open_features(out, "image")
        assert not result["cached"] and result["kept"] == {"image": 400} and table.compared().shape == (400, width)
        np.testing.assert_array_equal(table.pooled(), pooled)
    assert run(pictures(digits, tmp_path / "run", reduce={"width": 6}))[0]["cached"]
    result, _ = run(pictures(digits, tmp_path / "run"))
    assert (out / "image" / "data-00000-of-00001.arrow").read_bytes() == plain and result["reduced"] == {}


def test_neighbours_by_reduced_features_are_as_good(shared_datasets, tmp_path):
    """The nearest other recording says the same digit about as often, with a quarter of the numbers."""
    source = {"id": "d", "reader": "folder", "path": str(shared_datasets / "fsdd" / "recordings")}
    speech = {"hidden_size": 64, "sampling_rate": 8000, "n_fft": 200, "hop_length": 80, "num_mel_bins": 40}
    shares = {}
    for width in (None, 32):
        keys = {"encoders": {"audio": {"config": speech, "pool": "stats"}}, "tokens": False, "workers": 1}
        _, out = run(
            Recipe(
                run_dir=tmp_path / "run",
                sources=[{**source, "columns": {"label": r"(\d)_[a-z]+_"}}],
                extract={**keys, "reduce": None if width is None else {"width": width}},
            )
        )
        table = open_features(out, "audio")
        labels, vectors = np.array([Path(name).name[0] for name in table.ids]), table.compared()
        shares[width] = (labels[nearest(vectors, vectors, 2, "l2")[0][:, 1]] == labels).mean()
    print(shares)
    assert shares[None] > 0.8 and shares[32] >= shares[None] - 0.02, shares


def test_a_row_joins_its_picture_and_its_words(digits, tmp_path):
    facts, out = run(rows(digits, tmp_path / "run"))
    table, images, texts = (open_features(out, kind) for kind in ("joint", "image", "text"))
    assert facts["rows"] == {"image": 400, "text": len(texts.ids), "joint": 400} and len(texts.ids) < 80
    assert facts["index"]["joint"]["count"] == 400
    for row in (0, 399):
        parts = [name.partition("/")[2] for name in table.table.column("parts")[row].as_py()]
        own = [images.pooled()[images.row_of(parts[0])], texts.pooled()[texts.row_of(parts[1])]]
        wanted = np.concatenate([vector / np.linalg.norm(vector.astype(np.float64)) for vector in own])
        np.testing.assert_allclose(table.pooled()[row], wanted, atol=1e-6)
    shown = describe(out, split="joint")
    assert "joint 400" in render(shown) and "sha256:" in render(shown)


CHART_COLUMNS = {"question": "question", "context": "table", "answer": "answer", "image": "image"}


def test_a_chart_is_its_picture_and_the_table_behind_it(shared_datasets, tmp_path):
    folder = shared_datasets / "tabmwp"
    problems = json.loads((folder / "problems_dev1k.json").read_text())
    lines = [
        {**{name: own[name] for name in ("question", "answer", "table")}, "image": f"tables/{name}.png"}
        for name, own in list(problems.items())[:12]
    ]
    lines.append({**lines[0], "question": "What else does it say?"})
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    source = {
        "id": "c",
        "reader": "table",
        "task": "chart",
        "path": str(tmp_path / "rows.jsonl"),
        "images": str(folder),
    }
    keys = {"joint": ["image", "text"], "workers": 1, "reduce": {"width": 4, "of": ["joint"]}}
    facts, out = run(
        Recipe(
            run_dir=tmp_path / "run",
            model={"path": BASE},
            sources=[{**source, "columns": CHART_COLUMNS}],
            extract=keys,
        )
    )
    joint, texts = open_features(out, "joint"), open_features(out, "text")
    assert facts["rows"]["joint"] == 12 == facts["rows"]["image"] and joint.compared().shape == (12, 4)
    _, text = (name.partition("/")[2] for name in joint.table.column("parts")[0].as_py())
    assert texts.table.column("text")[texts.row_of(text)].as_py() == lines[0]["table"]


def test_a_chart_without_a_table_is_its_picture(shared_datasets, tmp_path):
    source = {"id": "c", "reader": "chartqa", "path": str(shared_datasets / "chartqa" / "test_human.json")}
    keys = {"joint": ["image", "text"], "workers": 1}
    asked = Recipe(run_dir=tmp_path / "run", model={"path": BASE}, sources=[source], extract=keys)
    facts, out = run(asked, limit=8)
    joint, images = open_features(out, "joint"), open_features(out, "image")
    assert facts["rows"]["text"] == 8 and facts["rows"]["joint"] == facts["rows"]["image"] <= 8
    assert [parts for (parts,) in joint.table.column("parts").to_pylist()] == [f"image/{name}" for name in images.ids]
    own = images.pooled().astype(np.float64)
    np.testing.assert_allclose(joint.pooled()[:, :128], own / np.linalg.norm(own, axis=1, keepdims=True), atol=1e-6)
    assert not joint.pooled()[:, 128:].any()


def test_a_row_without_a_kind_joins_what_it_has(digits, tmp_path):
    (tmp_path / "words.jsonl").write_text(json.dumps({"q": "words alone", "a": "1"}))
    reduce = {"method": "autoencoder", "width": 4, "steps": 50, "of": ["joint"]}
    asked = rows(digits, tmp_path / "run", reduce=reduce)
    words = {
        "id": "w",
        "reader": "table",
        "path": str(tmp_path / "words.jsonl"),
        "columns": {"question": "q", "answer": "a"},
    }
    asked = Recipe(**{**asked.model_dump(), "sources": [asked.sources[0].model_dump(), words]})
    facts, out = run(asked)
    table = open_features(out, "joint")
    alone = [at for at, parts in enumerate(table.table.column("parts").to_pylist()) if len(parts) == 1]
    assert alone == [300] and len(table.ids) == 301
    assert not table.pooled()[300, :128].any() and np.isfinite(table.compared()).all()
    assert facts["reduced"]["joint"]["lost"]["held_out"] is None


def test_numbers_that_are_not_finite_are_named():
    vectors = np.random.default_rng(0).normal(size=(6, 4))
    vectors[4, 1] = np.nan
    every = np.ones(6, np.bool_)
    with pytest.raises(DataError, match="the image of row 4 of image features has no finite numbers"):
        standardized({"image": vectors}, every[:, None], every, "image features")


@pytest.mark.parametrize(
    ("reduce", "change", "error", "said"),
    [
        ({"width": 32}, {}, RecipeError, "32 is no reduction of the image features, whose vectors are 32 numbers wide"),
        ({"width": 100, "method": "autoencoder"}, {}, RecipeError, "choose a width below 32"),
        ({"width": 8}, {"limit": 5}, DataError, "8 is more than 5 training image features span \\(4 directions\\)"),
        ({"width": 1}, {"limit": 1}, DataError, "the training vectors of image \\(1\\) are all the same"),
        ({"width": 4}, {"splits": ("test",)}, DataError, "no image features are of the split train"),
    ],
)
def test_what_cannot_be_reduced_is_one_clear_error(reduce, change, error, said, digits, tmp_path):
    limit = change.pop("limit", None)
    with pytest.raises(error) as raised:
        run(pictures(digits, tmp_path / "run", reduce=reduce, **change), limit=limit)
    assert re.search(said, f"{raised.value} {raised.value.hint}")
    assert not (tmp_path / "run" / "features").exists()


def test_equal_pictures_have_nothing_to_keep(tmp_path):
    (tmp_path / "media" / "train").mkdir(parents=True)
    for number in range(6):
        Image.new("L", (8, 8), 90).save(tmp_path / "media" / "train" / f"{number}_same.png")
    with pytest.raises(DataError, match="the training vectors of image \\(6\\) are all the same"):
        run(pictures(tmp_path / "media", tmp_path / "run", splits=("train",), reduce={"width": 2}))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"reduce": {"method": "autoencoder"}}, "width"),
        ({"reduce": {"width": 0}}, "greater than or equal to 1"),
        ({"reduce": {"width": 4, "hidden": 8}}, "hidden goes with method: autoencoder"),
        ({"reduce": {"width": 4, "of": ["joint"]}}, "say what is joined"),
        ({"joint": ["image"]}, "joins two kinds or more"),
        ({"joint": ["image", "text"], "modalities": ["image"]}, "joint asks for text, which modalities leaves out"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, said):
    with pytest.raises(ValidationError, match=said):
        Extract(**settings)
