import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtune.errors import DataError
from mmtune.readers import strict_json
from mmtune.readers.source import Refused, Row
from mmtune.readers.strict_json import iter_items, iter_jsonl, parse, stream_arrays
from mmtune.records import Reject

values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**12), 10**12) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(blacklist_categories=("Cs",))),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text("ab\\\"{[],:", max_size=4), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(st.lists(values, max_size=8), st.integers(1, 40), st.sampled_from([None, 1]), st.booleans())
def test_streamed_items_equal_json_loads_whatever_the_chunk(tmp_path_factory, items, chunk, indent, ascii_only):
    path = tmp_path_factory.mktemp("j") / "a.json"
    document = {"info": {"x": [1, {"y": 2}]}, "items": items, "after": "z"}
    path.write_text(json.dumps(document, indent=indent, ensure_ascii=ascii_only), "utf-8")
    before = strict_json._CHUNK
    strict_json._CHUNK = chunk
    try:
        rows = list(stream_arrays(path, ("items",)))
    finally:
        strict_json._CHUNK = before
    assert [row.value for key, row in rows if key == "items"] == items
    assert [row.value for key, row in rows if key == "after"] == ["z"]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 999), min_size=1, max_size=6), st.integers(1, 60))
def test_a_cut_file_is_always_an_error(tmp_path_factory, items, cut):
    path = tmp_path_factory.mktemp("j") / "a.json"
    text = json.dumps({"items": items})
    path.write_text(text[: max(1, len(text) - cut)])
    with pytest.raises(DataError) as error:
        list(stream_arrays(path, ("items",)))
    assert str(path) in error.value.message


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"a": 1, "a": 2}', "bad_json"),
        ('{"a": NaN}', "bad_json"),
        ('{"a": -Infinity}', "bad_json"),
        ('{"a": 1', "bad_json"),
        ('{"a": 1} x', "bad_json"),
        ('{"a": "\\ud800"}', "bad_unicode"),
        ("[" * 100_000 + "]" * 100_000, "too_deep"),
        ('{"a": ' + "9" * 20_000 + "}", "too_large"),
    ],
)
def test_refused_texts(text, reason):
    with pytest.raises(Refused) as refused:
        parse(text)
    assert refused.value.reason == reason


def test_a_surrogate_pair_is_a_character():
    assert parse('{"a": "\\ud83d\\ude00"}') == {"a": "😀"}


def test_mark_crlf_and_blank_lines_change_nothing(tmp_path: Path):
    clean, odd = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    clean.write_bytes(b'{"a": 1}\n{"a": 2}\n')
    odd.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\r\n   \n{"a": 2}')
    assert [(row.index, row.value) for row in iter_jsonl(clean)] == [(row.index, row.value) for row in iter_jsonl(odd)]
    assert [row.where for row in iter_jsonl(odd)] == ["b.jsonl:1", "b.jsonl:4"]


def test_one_bad_line_is_one_reject(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": "\xff"}\n{"a": 2}\n{"a": 3, "b"')
    first, bad, second, cut = iter_jsonl(path)
    assert (first.value, second.value) == ({"a": 1}, {"a": 2})
    assert isinstance(bad, Reject) and (bad.reason, bad.where) == ("bad_unicode", "a.jsonl:2")
    assert isinstance(cut, Reject) and (cut.reason, cut.where) == ("bad_json", "a.jsonl:4")


def test_an_over_long_line_is_refused_and_passed_over(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(strict_json, "MAX_LINE_BYTES", 64)
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": "' + "x" * 500 + '"}\n{"a": 1}\n')
    long, fine = iter_jsonl(path)
    assert isinstance(long, Reject) and long.reason == "too_large"
    assert fine.value == {"a": 1} and fine.where == "a.jsonl:2"


def test_a_bad_item_of_an_array_is_one_reject(tmp_path: Path):
    path = tmp_path / "a.json"
    path.write_bytes(b'[{"a": 1}, {"a": 1, "a": 2}, {"a": NaN}, {"a": "\xff"}, {"a": 5}]')
    items = list(iter_items(path))
    assert [item.value if isinstance(item, Row) else item.reason for item in items] == [
        {"a": 1}, "bad_json", "bad_json", "bad_unicode", {"a": 5},
    ]  # fmt: skip


@pytest.mark.parametrize("text", ['[{"a": 1},]', '{"items": [{"a": 1}],}', '{"items": [{"a": 1},\n]}'])
def test_a_comma_before_the_end_is_no_json(tmp_path: Path, text):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(DataError, match="a comma before") as error:
        list(stream_arrays(path, ("",) if text[0] == "[" else ("items",)))
    assert error.value.code == "bad_json"


def test_named_errors(tmp_path: Path):
    path = tmp_path / "a.json"
    for text, code in [("", "empty_input"), ('{"b": []}', "wrong_layout"), ('{"items": [], "items": []}', "bad_json")]:
        path.write_text(text)
        with pytest.raises(DataError) as error:
            list(stream_arrays(path, ("items",)))
        assert error.value.code == code and error.value.hint
    packed = tmp_path / "a.json.gz"
    packed.write_bytes(gzip.compress(json.dumps({"items": list(range(9999))}).encode())[:-40])
    with pytest.raises(DataError) as error:
        list(stream_arrays(packed, ("items",)))
    assert error.value.code == "bad_gzip"


def test_memory_stays_flat(tmp_path: Path):
    import tracemalloc

    path = tmp_path / "a.json"
    item = json.dumps({"text": "x" * 200})
    path.write_text('{"items": [' + ", ".join([item] * 100_000) + "]}")
    tracemalloc.start()
    count = sum(1 for _ in stream_arrays(path, ("items",)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 100_000
    assert peak < 12_000_000 < path.stat().st_size


@pytest.mark.parametrize("coding", ["utf-16", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.jsonl.gz"])
def test_a_file_of_another_coding_is_told_as_a_whole(tmp_path: Path, coding: str, name: str):
    text = ("\ufeff" if coding.endswith("be") else "") + '{"q": "what?"}\n'
    opened = gzip.open if name.endswith(".gz") else open
    with opened(tmp_path / name, "wb") as file:
        file.write(text.encode(coding))
    with pytest.raises(DataError, match=f"{name} is UTF-16, and UTF-8 is read") as error:
        list(iter_items(tmp_path / name))
    assert error.value.hint == "save it as UTF-8"
