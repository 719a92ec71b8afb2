"""Readers of text tasks on tiny files in the official layouts, and what they refuse."""

import json
from pathlib import Path

import pytest

from mmtune.errors import DataError
from mmtune.readers import find_reader
from mmtune.readers.conll import entity_spans
from mmtune.readers.limit import part
from mmtune.readers.source import SourceFiles
from mmtune.records import Medium, Record, Reject


def read(reader: str, path: Path, split: str = "train", **fields) -> list:
    return list(find_reader(reader)(SourceFiles(id="s", split=split, path=path, **fields)))


def test_squad(tmp_path: Path):
    asked = [
        {
            "id": "q1",
            "question": "Who? ",
            "answers": [{"text": "Ann", "answer_start": 0}, {"text": "Ann", "answer_start": 9}],
        },
        {"id": "q2", "question": "When?", "answers": [], "is_impossible": True},
        {"id": "q3", "question": "", "answers": [{"text": "x", "answer_start": 0}]},
        {"id": "q4", "question": "Why?", "answers": "no list"},
        {"id": "q5", "question": "How?"},
    ]
    articles = [{"title": "T", "paragraphs": [{"context": "Ann came.", "qas": asked}, {"context": 5}]}, 7]
    path = tmp_path / "s.json"
    path.write_text(json.dumps({"version": "1.1", "data": articles}))
    items = read("squad", path)
    found = {item.id: item for item in items if isinstance(item, Record)}
    assert found["s/q1"].references == ("Ann",) and found["s/q1"].context == "Ann came."
    assert found["s/q1"].text == "Who?" and found["s/q1"].metadata == {"title": "T"}
    assert found["s/q2"].references == ("unanswerable",)
    assert found["s/q5"].references == ()
    refused = [(item.reason, item.where) for item in items if isinstance(item, Reject)]
    assert refused == [
        ("empty_question", "s.json#data/0/paragraphs/0/qas/2"),
        ("bad_field", "s.json#data/0/paragraphs/0/qas/3"),
        ("bad_field", "s.json#data/0/paragraphs/1"),
        ("bad_field", "s.json#data/1"),
    ]
    path.write_text('{"data": []}')
    with pytest.raises(DataError, match="no articles"):
        read("squad", path)


def test_conll(tmp_path: Path):
    path = tmp_path / "n.conll"
    path.write_text(
        "-DOCSTART- -X- O O\n\nNew NNP I-NP I-LOC\nYork NNP I-NP I-LOC\nis VBZ I-VP O\n\n"
        "Ann\tB-PER\nBob\tB-PER\n\t\nbroken\n\nno\tO\nnames\tO\n"
    )
    first, second, third, fourth = read("conll", path)
    assert (first.text, first.references, first.where) == ("New York is", ("LOC: New York",), "n.conll:3")
    assert second.references == ("PER: Ann; PER: Bob",) and second.fields == {"types": "LOC, PER"}
    assert third.reason == "bad_field" and third.where == "n.conll:10"
    assert fourth.references == ("none",) and fourth.task == "named_entity_recognition"
    path.write_text("a\tO\n")
    with pytest.raises(DataError, match="tags no entity"):
        read("conll", path)


@pytest.mark.parametrize(
    ("tags", "spans"),
    [
        ("B-A I-A O", [("A", 0, 2)]),
        ("B-A B-A I-A", [("A", 0, 1), ("A", 1, 3)]),
        ("I-A I-A I-B", [("A", 0, 2), ("B", 2, 3)]),
        ("O I-A O I-A", [("A", 1, 2), ("A", 3, 4)]),
        ("B-A I-B", [("A", 0, 1), ("B", 1, 2)]),
        ("O O", []),
    ],
)
def test_entities_begin_and_end_as_in_conlleval(tags: str, spans: list):
    assert entity_spans(tags.split()) == spans


def test_rt_polarity(tmp_path: Path):
    (tmp_path / "rt-polarity.pos").write_bytes("good one\n\nna\u00efve fun \n".encode())
    (tmp_path / "rt-polarity.neg").write_bytes(b"dull \n caf\xe9\n")
    dull, bad, good, fun = read("rt_polarity", tmp_path)
    assert (dull.id, dull.text, dull.references, dull.options) == (
        "s/neg-1",
        "dull",
        ("negative",),
        ("negative", "positive"),
    )
    assert bad.reason == "bad_unicode" and bad.where == "rt-polarity.neg:2"
    assert (good.references, fun.id, fun.text) == (("positive",), "s/pos-3", "na\u00efve fun")
    (tmp_path / "rt-polarity.pos").unlink()
    with pytest.raises(DataError, match="not there"):
        read("rt_polarity", tmp_path)


def test_tweeteval(tmp_path: Path):
    (tmp_path / "mapping.txt").write_text("0\tanger\n1\tjoy")
    (tmp_path / "val_text.txt").write_text("one\ntwo\nthree\n")
    (tmp_path / "val_labels.txt").write_text("1\n7\n0\n")
    one, two, three = read("tweeteval", tmp_path, "val")
    assert (one.references, one.options, one.where) == (("joy",), ("anger", "joy"), "val_text.txt:1")
    assert two.reason == "no_label" and three.references == ("anger",)
    (tmp_path / "val_labels.txt").write_text("1\n")
    with pytest.raises(DataError) as error:
        read("tweeteval", tmp_path, "val")
    assert error.value.code == "label_mismatch"


def test_t0(tmp_path: Path):
    rows = [{"prompt": "Liked?\n", "completion": "Yes<|endoftext|>"}, {"prompt": "x", "completion": "<|endoftext|>"}]
    (tmp_path / "imdb_a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "empty.jsonl").write_text("\n")
    found, refused = read("t0", tmp_path)
    assert [message.text for message in found.messages] == ["Liked?", "Yes"]
    assert found.metadata == {"template": "imdb_a"} and refused.reason == "empty_answer"
    with pytest.raises(DataError, match="no rows"):
        read("t0", tmp_path / "empty.jsonl")


def test_parts_are_disjoint_whole_and_keep_media_together():
    def row(at: int, **fields) -> Record:
        return Record(f"s/{at}", "s", "vqa", "train", where=f"f:{at}", **fields)

    items = [row(at) for at in range(2000)]
    first, second = list(part(items, 0.0, 0.9)), list(part(items, 0.9, 1.0))
    assert sorted([*first, *second], key=lambda one: int(one.id[2:])) == items
    assert 140 <= len(second) <= 260  # 200 +- 4.5 sigma
    shared = [row(at, media=(Medium("image", f"{at % 20}.jpg"),)) for at in range(200)]
    kept = [{one.media[0].path for one in part(shared, *bounds)} for bounds in ((0, 0.5), (0.5, 1))]
    assert not kept[0] & kept[1] and len(kept[0] | kept[1]) == 20
    told = [row(at, context=f"c{at % 20}") for at in range(200)]
    assert not {one.context for one in part(told, 0, 0.5)} & {one.context for one in part(told, 0.5, 1)}
