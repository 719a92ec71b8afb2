"""Histories of a table, of messages and of placeholders become media; what is no history is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mmtune.media.known import media_places
from mmtune.readers.limit import part
from mmtune.readers.messages import read_messages
from mmtune.readers.roots import media_roots
from mmtune.readers.sharegpt import read_sharegpt
from mmtune.readers.source import SourceFiles
from mmtune.readers.table import read_table
from mmtune.records import IN_FILES, Reject, history, items_of


def read(reader: Any, folder: Path, row: dict[str, Any], **more: Any) -> Any:
    path = folder / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n", "utf-8")
    (found,) = reader(SourceFiles("s", "train", path=path, **more))
    return found


@pytest.mark.parametrize("items", [(), ("318",), ("318", "50", "318"), ("été", "a b", "\udce9")])
def test_a_history_keeps_its_items(items: tuple[str, ...]) -> None:
    medium = history(items)
    assert items_of(medium) == items and medium.frames == len(items) and medium.path == ""
    assert history(items) == medium and history((*items, "1")) != medium


@pytest.mark.parametrize(
    ("cell", "items"),
    [
        (["318", 50], ("318", "50")),
        ("318 50|7", ("318", "50", "7")),
        ('["a b"]', ("a b",)),
        (None, ()),
        ([], ()),
        (7, ("7",)),
    ],
)
def test_a_column_of_histories_is_shown(cell: Any, items: tuple[str, ...], tmp_path: Path) -> None:
    columns = {"behaviour": "past", "question": "q", "answer": "a"}
    record = read(read_table, tmp_path, {"past": cell, "q": "Will they?", "a": "yes"}, columns=columns)
    assert record.media == (history(items),) and record.history is None and record.task == "instruction"


def test_several_columns_are_several_histories(tmp_path: Path) -> None:
    columns = {"behaviour": ["past", "film"], "history": "past", "question": "q", "answer": "a"}
    record = read(read_table, tmp_path, {"past": [1, 2], "film": 3, "q": "Will they?", "a": "yes"}, columns=columns)
    assert record.media == (history(("1", "2")), history(("3",))) and record.history == ("1", "2")


@pytest.mark.parametrize(
    ("cell", "said"),
    [
        ({"item": 3}, "/past/0: expected a string, found an object"),
        ([["1"]], "/past/0: expected a string, found a list"),
        (["1", None], "/past/1: expected an item, found null"),
        (["1", ""], "/past/1: expected an item, found nothing"),
        (["a\nb"], "/past/0: an item has no line break"),
        ("[1, 2", "/past: begins like a list"),
        ("nan", "'nan' is no item"),
    ],
)
def test_what_is_no_history_is_refused(cell: Any, said: str, tmp_path: Path) -> None:
    columns = {"behaviour": "past", "question": "q", "answer": "a"}
    found = read(read_table, tmp_path, {"past": cell, "q": "Will they?", "a": "yes"}, columns=columns)
    assert isinstance(found, Reject) and found.reason == "bad_field" and said in found.detail


ANSWER = {"role": "assistant", "content": "yes"}


def test_messages_name_histories_or_take_the_next(tmp_path: Path) -> None:
    part_of = {"type": "behaviour", "behaviour": ["1", "2"]}
    turn = {"role": "user", "content": [part_of, {"type": "behaviour"}, {"type": "text", "text": "Will they?"}]}
    record = read(read_messages, tmp_path, {"messages": [turn, ANSWER], "histories": [["3"]]})
    assert record.messages[0].media == (history(("1", "2")), history(("3",)))
    found = read(read_messages, tmp_path, {"messages": [turn, ANSWER], "histories": "3"})
    assert isinstance(found, Reject) and found.detail == "/histories: expected a list, found a string"
    found = read(read_messages, tmp_path, {"messages": [turn, ANSWER]})
    assert isinstance(found, Reject) and found.reason == "media_mismatch"


def test_placeholders_stand_for_histories(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "<behaviour>\nWill they?"}, {"from": "gpt", "value": "yes"}]
    record = read(read_sharegpt, tmp_path, {"conversations": turns, "histories": [["3", "4"]]})
    assert record.messages[0].media == (history(("3", "4")),) and record.messages[0].text == "Will they?"


def test_histories_widen_no_media_root(tmp_path: Path) -> None:
    """A row's table may stand anywhere: only folders of files are opened, and the folder above them all."""
    folders = {f"{kind}s": tmp_path / "media" / kind for kind in IN_FILES}
    source = SourceFiles("s", "train", path=tmp_path / "tables" / "rows.jsonl", **folders)
    assert media_places([media_roots("table", source, tmp_path)])[0] == str(tmp_path / "media")


def test_rows_of_one_history_stay_in_one_part(tmp_path: Path) -> None:
    columns = {"behaviour": "past", "question": "q", "answer": "a"}
    path = tmp_path / "rows.jsonl"
    rows = [{"past": [str(at // 4)], "q": f"Will they {at}?", "a": "yes"} for at in range(80)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    source = SourceFiles("s", "train", path=path, columns=columns)
    shown = [{one.media[0].data for one in part(read_table(source), *cut)} for cut in ((0, 0.5), (0.5, 1))]
    assert all(shown) and not shown[0] & shown[1]
