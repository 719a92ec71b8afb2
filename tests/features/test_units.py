"""Which texts and media of a record get features, and which of them anew."""

import pytest

from mmtune.features.units import KINDS, Unit, by_length, gather, known_as, text_id, todo, units_of
from mmtune.media.known import MediaPlace
from mmtune.records import Medium, Message, Record, Reject, TextPart, history

PLACE = MediaPlace({"image": "/m/a"}, {"image": "a/"})


def record(**fields) -> Record:
    return Record(**{"id": "r", "source": "s", "task": "vqa", "split": "train", "where": "f:1", **fields})


@pytest.mark.parametrize(
    ("fields", "texts"),
    [
        ({"text": "who?", "context": "a tale", "references": ("he",)}, ["who?\na tale"]),
        ({"task": "chart", "text": "how much?", "context": "x,1", "media": (Medium("image", "c.png"),)},
         ["how much?", "x,1"]),
        ({"media": (Medium("image", "c.png"),), "references": ("a cat",)}, []),
        ({"task": "text", "references": ("a tale",)}, ["a tale"]),
        ({"messages": (Message("user", (TextPart("hi"),)), Message("assistant", (TextPart("no"),)),
                       Message("user", (TextPart("so?"),)))}, ["hi\nso?"]),
        ({"history": ("1", "2"), "references": ("3",)}, []),
    ],
)  # fmt: skip
def test_the_texts_of_a_record_are_never_its_answers(fields, texts):
    assert [unit.text for unit in units_of(record(**fields), PLACE) if unit.kind == "text"] == texts


def test_media_are_named_below_the_common_root_and_bytes_by_their_sha256():
    units = list(units_of(record(media=(Medium("image", "x.png"), Medium("image", "", data=b"ab"))), PLACE))
    assert [unit.id for unit in units] == ["a/x.png", text_id(b"ab")]


def test_a_history_that_is_shown_is_the_one_that_is_told():
    (shown,) = (unit for unit in units_of(record(media=(history(("1", "2")),)), PLACE) if unit.kind == "behaviour")
    (told,) = (unit for unit in units_of(record(history=("1", "2")), PLACE) if unit.kind == "behaviour")
    assert shown == told and shown.items == ("1", "2") and shown.medium is None
    assert known_as(record(media=(history(("1", "2")),), text="who?"), PLACE)[0] == f"behaviour/{shown.id}"


def test_what_is_shown_twice_is_gathered_once_with_all_its_splits(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.png").write_bytes(b"12345")
    items = [
        record(media=(Medium("image", "x.png"),), text="q"),
        record(media=(Medium("image", "x.png"), Medium("image", "gone.png")), text="q", split="val"),
        record(media=(Medium("image", "gone.png"),), text="q", split="val"),
        Reject("f:9", "r9", "bad_json"),
    ]
    found = gather([(item, PLACE) for item in items], str(tmp_path), ("image", "text"))
    assert {kind: [unit.id for unit in units] for kind, units in found.units.items()} == {
        "image": ["a/x.png"],
        "text": [text_id("q")],
    }
    assert found.splits["image", "a/x.png"] == ["train", "val"]
    assert [reject.reason for reject in found.rejects] == ["media_missing", "bad_json"]
    assert (found.read, found.refused, found.units["image"][0].size) == (4, 1, 5)
    again = gather([(item, PLACE) for item in items[:-1]], str(tmp_path), ("image", "text"))
    assert again.digest != found.digest


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("http://x.invalid/a.jpg", "url_refused"),
        ("/etc/hostname", "path_escape"),
        ("../b/x.png", "path_escape"),
        ("gone.png", "media_missing"),
        ("", "bad_path"),
        ("x" * 300 + ".png", "bad_path"),
    ],
)
def test_an_unsafe_path_is_refused_for_the_reason_that_build_data_gives(tmp_path, path, reason):
    (tmp_path / "a").mkdir()
    found = gather([(record(media=(Medium("image", path),)), PLACE)], str(tmp_path), ("image",))
    assert [reject.reason for reject in found.rejects] == [reason] and not found.units


def test_a_chart_is_its_picture_and_its_table_whatever_is_asked(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.png").write_bytes(b"12345")
    chart = {"task": "chart", "media": (Medium("image", "x.png"),)}
    items = [
        record(**chart, text="how much?", context="x,1"),
        record(**chart, text="how many?", context="x,1", split="val"),
        record(**chart, text="how much?"),
        record(media=(Medium("image", "x.png"),), text="what is it?"),
        record(text="words alone"),
        record(history=("1", "2")),
    ]

    def gathered(together):
        return gather([(item, PLACE) for item in items], str(tmp_path), KINDS, together)

    picture, table, asked, words = (
        ("image", "a/x.png"),
        *(("text", text_id(text)) for text in ("x,1", "what is it?", "words alone")),
    )
    found = gathered(["image", "text"])
    assert [row.parts for row in found.joint] == [(picture, table), (picture,), (picture, asked), (words,)]
    assert [row.splits for row in found.joint] == [("train", "val"), ("train",), ("train",), ("train",)]
    assert len({row.id for row in found.joint}) == 4
    assert not gathered([]).joint and gathered([]).digest != found.digest
    assert gathered(["image", "behaviour"]).joint[-1].parts == (("behaviour", text_id("1\n2")),)


def test_only_a_file_of_another_time_is_read():
    units = [Unit("image", name, "", size=5, mtime_ns=1) for name in "abcde"]
    kept = {"a": (5, 1, "x"), "b": (5, 2, "same"), "c": (5, 2, "other"), "d": (6, 1, "x")}
    read = []

    def digest(unit: Unit) -> str:
        read.append(unit.id)
        return "same"

    missing, changed = todo(units, kept, digest)
    assert [unit.id for unit in missing] == ["c", "d", "e"] and changed == 2 and read == ["b", "c"]


def test_sounds_are_ordered_by_length_and_images_stay():
    sizes = (3, 1, 2)
    for kind, expected in (("audio", [1, 2, 3]), ("image", [3, 1, 2])):
        units = [Unit(kind, str(size), "", size=size) for size in sizes]
        assert [unit.size for unit in by_length(units)] == expected
