"""Readers of tables, folders and saved datasets on tiny files, and what they refuse."""

import csv
import os
import re
from pathlib import Path

import pytest

from mmtune.errors import CapabilityError, DataError, RecipeError
from mmtune.readers.table import _KNOWN
from mmtune.recipe import Source
from mmtune.records import Medium, Record, Reject, TextPart
from tests.readers.reading import read, reasons, write


def test_table_gives_the_same_records_from_every_format(tmp_path: Path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"k": str(at), "q": f"what, {at}?", "a": f"ä{at}", "img": f"{at}.png"} for at in range(5)]
    write(tmp_path / "t.jsonl", rows)
    write(tmp_path / "t.json", rows)
    write(tmp_path / "d.json", {"data": rows, "version": 1})
    write(tmp_path / "o.json", {row["k"]: row for row in rows})
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    for name, delimiter in (("t.csv", ","), ("t.tsv", "\t"), ("semi.csv", ";")):
        with open(tmp_path / name, "w", newline="", encoding="utf-8-sig") as handle:
            writer = csv.DictWriter(handle, rows[0], delimiter=delimiter)
            writer.writeheader()
            writer.writerows(rows)
    columns = {"id": "k", "question": "q", "answer": "a", "image": "pics/{img}"}
    extra = {"d.json": {"rows": "data"}, "semi.csv": {"delimiter": ";"}}
    seen = []
    for name in ("t.jsonl", "t.json", "d.json", "o.json", "t.parquet", "t.csv", "t.tsv", "semi.csv"):
        items = read("table", path=tmp_path / name, columns={**columns, **extra.get(name, {})})
        seen.append([(r.id, r.task, r.text, r.references, r.media) for r in items])
    assert seen[0][2] == ("s/2", "vqa", "what, 2?", ("ä2",), (Medium("image", "pics/2.png"),))
    assert all(found == seen[0] for found in seen)


def test_table_columns(tmp_path: Path):
    path = write(tmp_path / "t.jsonl", [{"A": "x", "B": "y", "right": "y", "n": 3.0, "ok": True, "none": None}])
    columns = {"question": "=Which?", "options": ["A", "B"], "answer": "right", "metadata": ["n", "ok", "none"]}
    (row,) = read("table", path=path, columns=columns)
    assert (row.text, row.options, row.metadata, row.task) == (
        "Which?",
        ("x", "y"),
        {"n": "3", "ok": "yes"},
        "instruction",
    )
    (row,) = read("table", path=path, columns={"answer": "right", "image": "A", "options": "=x|y"})
    assert (row.task, row.options) == ("label", ("x", "y"))
    (row,) = read("table", path=path, columns={"answer": "right", "image": "A"}, tasks=("caption",))
    assert row.task == "caption"
    assert reasons(read("table", path=path, columns={"answer": "gone"})) == ["bad_field"]
    assert reasons(read("table", path=path, columns={"answer": "none"})) == ["empty_answer"]
    with pytest.raises(RecipeError, match="unknown name 'anser'"):
        read("table", path=path, columns={"anser": "A"})
    with pytest.raises(RecipeError, match="needs `columns`"):
        read("table", path=path)


@pytest.mark.parametrize(("mark", "named"), [(";", '";"'), ("\t", r'"\t"'), ("|", '"|"')])
def test_a_head_in_one_piece_is_told_which_delimiter_to_name(tmp_path: Path, mark: str, named: str):
    path = tmp_path / "t.csv"
    path.write_text(f"q{mark}a\nwhat?{mark}red\n")
    with pytest.raises(DataError) as error:
        read("table", path=path, columns={"question": "q", "answer": "a"})
    assert f"add `delimiter: {named}` to `columns`" in error.value.hint
    (row,) = read("table", path=path, columns={"question": "q", "answer": "a", "delimiter": mark})
    assert isinstance(row, Record) and row.text == "what?"


def test_table_csv_faults(tmp_path: Path):
    path = tmp_path / "t.csv"
    path.write_bytes(b'q,a\nfine,yes\nshort\nbad \xff,yes\n"two\nlines",yes\n\nq,\n')
    items = read("table", path=path, columns={"question": "q", "answer": "a"})
    assert reasons(items) == ["bad_row", "bad_unicode", "empty_answer"]
    assert [item.text for item in items if isinstance(item, Record)] == ["fine", "two\nlines"]
    with pytest.raises(DataError) as error:
        read("table", path=path, columns={"question": "query", "answer": "a"})
    assert error.value.code == "missing_column" and "q, a" in error.value.hint
    path.write_text("q,a,a\nx,yes,no\n")
    with pytest.raises(DataError) as error:
        read("table", path=path, columns={"question": "{q}", "answer": "{a}"})
    assert error.value.code == "duplicate_column" and "2 columns named 'a'" in error.value.message
    assert len(read("table", path=path, columns={"answer": "q"})) == 1
    broken = tmp_path / "t.parquet"
    broken.write_bytes(b"PAR1 not really")
    with pytest.raises(DataError) as error:
        read("table", path=broken, columns={"answer": "a"})
    assert error.value.code == "bad_parquet"
    for name in ("e.jsonl", "e.csv", "e.txt"):
        (tmp_path / name).touch()
        with pytest.raises(DataError) as error:
            read("table", path=tmp_path / name, columns={"answer": "a"})
        assert error.value.code == "empty_input"


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"delimiter": ";;"}, "columns.delimiter is ';;'"),
        ({"delimiter": ""}, "columns.delimiter is ''"),
        ({"delimiter": "\n"}, "columns.delimiter is"),
        ({"delimiter": 0}, "columns.delimiter is 0"),
        ({"question": ["q", "a"]}, "columns.question is a list; it takes one column"),
    ],
)
def test_a_column_map_that_cannot_be_followed_is_a_usage_error(tmp_path: Path, columns, said):
    (tmp_path / "t.csv").write_text("q,a\nx,y\n")
    with pytest.raises(RecipeError, match=re.escape(said)):
        read("table", path=tmp_path / "t.csv", columns={"answer": "a", **columns})


def test_odd_parquet(tmp_path: Path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "t.parquet"
    text = pa.array([b"fine", b"\xff", b"too"]).view(pa.string())
    pq.write_table(pa.table({"q": text, "a": [1.0, 2.0, float("nan")]}), path)
    one, *refused = read("table", path=path, columns={"question": "q", "answer": "a"})
    assert (one.text, one.references) == ("fine", ("1",))
    assert [(item.where, item.reason) for item in refused] == [
        ("t.parquet#1", "bad_unicode"),
        ("t.parquet#2", "bad_field"),
    ]
    pq.write_table(pa.Table.from_arrays([pa.array(["x"]), pa.array(["y"])], names=["a", "a"]), path)
    with pytest.raises(DataError) as error:
        read("table", path=path, columns={"answer": "a"})
    assert error.value.code == "duplicate_column"


def test_a_row_without_its_question_is_refused_where_one_is_asked(tmp_path: Path):
    path = write(tmp_path / "q.jsonl", [{"q": "Why?", "a": "so", "i": "a.jpg"}, {"q": " ", "a": "so", "i": "b.jpg"}])
    for columns in ({"question": "q", "answer": "a"}, {"question": "q", "answer": "a", "image": "i"}):
        assert reasons(read("table", path=path, columns=columns)) == ["empty_question"]
    columns = {"text": "q", "answer": "a", "image": "i"}
    assert not reasons(read("table", path=path, columns=columns, tasks=("caption",)))
    assert not reasons(read("table", path=path, columns={"answer": "a"}))


def test_a_refused_row_has_the_id_that_it_would_have_had(tmp_path: Path):
    rows = [{"id": 7, "name": "x", "q": "", "a": "y"}, {"id": "", "name": "", "q": "", "a": "y"}]
    path, columns = write(tmp_path / "r.jsonl", rows), {"question": "q", "answer": "a"}
    named = [read("table", path=path, columns=columns | own) for own in ({"id": "id"}, {"id": "name"}, {})]
    assert [[item.id for item in items] for items in named] == [
        ["s/7", "s/train-1"],
        ["s/x", "s/train-1"],
        ["s/train-0", "s/train-1"],
    ]
    assert [item.id for item in read("messages", path=path)] == ["s/7", "s/train-1"]


@pytest.mark.parametrize(
    ("cell", "items"),
    [
        (["a b, c", "C|D"], ("a b, c", "C|D")),
        (["ünï 🦄"], ("ünï 🦄",)),
        ([], ()),
        (None, ()),
        ([7, 8], ("7", "8")),
        (7, ("7",)),
        ("1 2,3|4", ("1", "2", "3", "4")),
        ('["Alien", "Paris, Texas"]', ("Alien", "Paris, Texas")),
        (["nan"], ("nan",)),
        (["a", None], "/past/1: expected an item, found null"),
        (["a", ""], "/past/1: expected an item, found nothing"),
        ("nan", "'nan' is no item"),
        ("a,null", "'null' is no item"),
        ('["Alien", NaN]', "/past: begins like a list"),
        ("['1', '2']", "/past: begins like a list"),
        ({"a": 1}, "expected a string, found an object"),
    ],
)
def test_the_items_of_a_history(tmp_path: Path, cell, items):
    path = write(tmp_path / "h.jsonl", [{"past": cell, "next": "x"}])
    (found,) = read("table", path=path, columns={"history": "past", "answer": "next"})
    if isinstance(items, str):
        assert isinstance(found, Reject) and found.reason == "bad_field" and items in found.detail
    else:
        assert found.history == items


def test_a_history_in_columns_has_the_filled_ones(tmp_path: Path):
    path = write(tmp_path / "h.csv", "a,b,c,next\none two,,three,x\n")
    (found,) = read("table", path=path, columns={"history": ["a", "b", "c"], "answer": "next"})
    assert found.history == ("one two", "three")


def test_folder(tmp_path: Path):
    for name in ("cat/1.jpg", "cat/2.PNG", "dog/1.wav", "dog/notes.txt", ".hidden/x.jpg", "top.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    items = read("folder", path=tmp_path)
    kept = [item for item in items if isinstance(item, Record)]
    assert [(r.id, r.references, r.options, r.media[0].modality) for r in kept] == [
        ("s/cat/1.jpg", ("cat",), ("cat", "dog"), "image"),
        ("s/cat/2.PNG", ("cat",), ("cat", "dog"), "image"),
        ("s/dog/1.wav", ("dog",), ("cat", "dog"), "audio"),
    ]
    assert sorted(reasons(items)) == ["no_label", "not_media"]
    digits = tmp_path / "digits"
    digits.mkdir()
    for name in ("7_ann_0.wav", "3_bob_9.wav", "odd.wav"):
        (digits / name).touch()
    items = read("folder", path=digits, columns={"label": r"(?P<label>\d)_(?P<speaker>[a-z]+)_"})
    assert [(r.references, r.metadata) for r in items if isinstance(r, Record)] == [
        (("3",), {"speaker": "bob"}),
        (("7",), {"speaker": "ann"}),
    ]
    assert reasons(items) == ["no_label"]
    (only,) = read("folder", path=digits, columns={"label": r"(\d)_", "keep": "_0"})
    assert only.references == ("7",)
    with pytest.raises(RecipeError, match="regular expression"):
        read("folder", path=digits, columns={"label": "("})


def test_a_file_whose_name_is_not_utf8_is_refused(tmp_path: Path):
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "a.png").touch()
    for name in (b"/cat/\xff.png", b"/\xfe"):
        path = Path(os.fsdecode(os.fsencode(tmp_path) + name))
        (path / "b.png" if not path.suffix else path).parent.mkdir(exist_ok=True)
        (path / "b.png" if not path.suffix else path).touch()
    items = read("folder", path=tmp_path)
    assert sorted(reasons(items)) == ["bad_unicode"] * 2
    assert [item.options for item in items if isinstance(item, Record)] == [("cat",)]


def test_hf_from_a_saved_folder(tmp_path: Path):
    import datasets

    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    saved = datasets.DatasetDict(
        {
            "train": datasets.Dataset.from_list([{"messages": turns}] * 3),
            "validation": datasets.Dataset.from_list([{"messages": turns}]),
        }
    )
    saved.save_to_disk(tmp_path / "chat")
    assert len(read("hf", path=tmp_path / "chat")) == 3
    assert len(read("hf", "val", path=tmp_path / "chat")) == 1
    assert len(read("hf", path=tmp_path / "chat", subset="validation")) == 1
    with pytest.raises(DataError) as error:
        read("hf", "test", path=tmp_path / "chat")
    assert error.value.code == "split_missing"
    datasets.Dataset.from_list([{"chosen": turns, "rejected": turns}]).save_to_disk(tmp_path / "pairs")
    assert [turn.text for turn in read("hf", path=tmp_path / "pairs")[0].messages] == ["q", "a"]
    features = datasets.Features(
        {"img": datasets.Image(), "q": datasets.Value("string"), "a": datasets.Value("string")}
    )
    rows = [{"img": {"bytes": b"not decoded", "path": None}, "q": "what?", "a": "x"}]
    datasets.Dataset.from_list(rows, features=features).save_to_disk(tmp_path / "vqa")
    (row,) = read("hf", path=tmp_path / "vqa", columns={"image": "img", "question": "q", "answer": "a"})
    assert row.media == (Medium("image", "", data=b"not decoded"),) and row.task == "vqa"
    with pytest.raises(CapabilityError) as unreachable:
        read("hf", path=Path("nobody/no-such-dataset"), columns={"answer": "a"})
    assert "save_to_disk" in unreachable.value.hint
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "x.parquet").write_bytes(b"no table")
    for folder, code in (("gone", "file_missing"), ("words", "bad_dataset")):
        with pytest.raises(DataError) as error:
            read("hf", path=tmp_path / folder, columns={"answer": "a"})
        assert error.value.code == code


def test_files_named_by_a_column_of_images_without_bytes_are_told_how_to_bring_them(tmp_path: Path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path, columns = tmp_path / "t.parquet", {"image": "img", "question": "q", "answer": "a"}
    # What `datasets.Dataset.to_parquet` writes of a column of images that are files.
    row = {"img": {"bytes": None, "path": "/data/cats/1.png"}, "q": "what?", "a": "a cat"}
    pq.write_table(pa.Table.from_pylist([row]), path)
    (refused,) = read("table", path=path, columns=columns)
    assert refused.reason == "path_escape" and "/data/cats/1.png" in refused.detail
    assert refused.detail.endswith("to_parquet stores paths alone, save_to_disk the bytes too (reader: hf)")
    (record,) = read("table", path=path, columns={**columns, "strip": "/data/"})
    assert record.media == (Medium("image", "cats/1.png"),)


def test_hf_reads_placeholders_in_strings_as_files_and_parts_as_they_are(tmp_path: Path):
    import datasets

    def rows(*contents) -> list[dict]:
        turns = [{"role": role, "content": text} for role, text in zip(("user", "assistant"), contents, strict=True)]
        return [{"messages": turns, "images": ["a.jpg"]}, {"messages": turns, "images": []}]

    text = [{"type": "text", "text": "A cat."}]
    parts = [{"type": "image", "text": None}, {"type": "text", "text": "Is <image> a word?"}]
    for name, made in (("marked", rows("<image>What?", "A cat.")), ("parts", rows(parts, text))):
        datasets.Dataset.from_list(made).save_to_disk(tmp_path / name)
    shown, words = read("hf", path=tmp_path / "marked")
    assert shown.messages[0].parts == (Medium("image", "a.jpg"), TextPart("What?"))
    # No file is listed: the characters are words.
    assert words.messages[0].parts == (TextPart("<image>What?"),)
    shown, refused = read("hf", path=tmp_path / "parts")
    assert shown.messages[0].parts == (Medium("image", "a.jpg"), TextPart("Is <image> a word?"))
    assert isinstance(refused, Reject) and refused.reason == "media_mismatch"


def test_a_row_without_its_image_is_refused_and_images_may_be_none(tmp_path: Path):
    path = write(tmp_path / "t.jsonl", [{"q": "a?", "a": "b", "i": name} for name in ("", "x.png")])
    one = read("table", path=path, columns={"question": "q", "answer": "a", "image": "i"})
    assert reasons(one) == ["no_image"]
    assert "/i (for image): empty" in next(item.detail for item in one if isinstance(item, Reject))
    many = read("table", path=path, columns={"question": "q", "answer": "a", "images": "i"})
    assert [len(item.media) for item in many] == [0, 1]


def test_a_wrong_cell_is_named_by_its_own_column(tmp_path: Path):
    path = write(tmp_path / "t.jsonl", [{"ask": ["a?"], "a": "b"}, {"ask": "a?", "a": " "}])
    items = read("table", path=path, columns={"instruction": "ask", "output": "a"})
    assert [item.detail for item in items] == [
        "/ask (for instruction): expected a string, found a list",
        "/a: the answer is empty",
    ]


def test_every_name_of_a_column_is_told(repository: Path):
    told = (repository / "README.md").read_text("utf-8").partition("Names of `columns` are ")[2].partition("\n\n")[0]
    field = Source.model_fields["columns"].description or ""
    for name in _KNOWN - {"images", "audios", "videos"}:
        assert f"`{name}`" in told and re.search(rf"\b{name}\b", field), name


@pytest.mark.parametrize("name", ("t.csv", "t.jsonl"))
def test_where_keeps_the_rows_whose_columns_hold_what_is_wanted(tmp_path: Path, name: str):
    folds, rows = ["train", "dev", "train", "test"], []
    for at, fold in enumerate(folds):
        rows.append({"q": f"what, {at}?", "a": f"a{at}", "fold": fold, "level": at % 2, "ok": at < 2})
    if name == "t.csv":
        with open(tmp_path / name, "w", newline="", encoding="utf-8") as handle:
            writer = csv.DictWriter(handle, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    else:
        write(tmp_path / name, rows)

    def ids(where):
        found = read("table", path=tmp_path / name, columns={"question": "q", "answer": "a"}, where=where)
        return [record.id for record in found]

    # A row's id is its place in the file, whatever is read of it.
    assert ids({"fold": "train"}) == ["s/train-0", "s/train-2"]
    assert ids({"fold": ("dev", "test")}) == ["s/train-1", "s/train-3"]
    assert ids({"level": 1, "ok": True}) == ids({"level": "1", "ok": True}) == ["s/train-1"]
    with pytest.raises(DataError, match=r"no row of .*t\.\w+ is wanted by where: \{fold: trian\}") as wrong:
        ids({"fold": "trian"})
    assert wrong.value.hint == "fold holds dev, test, train"
    with pytest.raises(DataError) as wrong:
        ids({"flod": "train"})
    assert wrong.value.hint == "there is no column 'flod'; the first row has q, a, fold, level, ok"


def test_where_reads_conversations_and_rows_that_are_lists(tmp_path: Path):
    path = write(tmp_path / "t.json", [["q0", "a0", "x"], ["q1", "a1", "y"]])
    (row,) = read("table", path=path, columns={"question": 0, "answer": 1}, where={"2": "y"})
    assert row.references == ("a1",)
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    rows = [{"messages": turns, "lang": lang} for lang in ("de", "en", "de")]
    path = write(tmp_path / "m.jsonl", rows)
    for reader in ("messages", "sharegpt"):
        assert len(read(reader, path=path, where={"lang": "de"})) == 2
