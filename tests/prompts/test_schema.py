import json
from typing import get_args

import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtune.prompts.schema import example_to_row, instructions_schema, row_to_example
from mmtune.records import IN_FILES, Example, Medium, Message, Role, TextPart, ToolCall, history

text = st.text(st.characters(blacklist_categories=("Cs",)), max_size=8)
small = st.integers(0, 2**31 - 1)
single = st.floats(0, 1e6, width=32)
files = st.builds(
    Medium, st.sampled_from(IN_FILES), text, st.none() | st.binary(max_size=6), st.integers(0, 2**50), text,
    small, small, small, single, small, single,
)  # fmt: skip
items = text.filter(lambda item: item and "\n" not in item)
media = files | st.builds(history, st.lists(items, max_size=3))
messages = st.builds(
    Message,
    st.sampled_from(get_args(Role)),
    st.lists(st.builds(TextPart, text) | media, max_size=4).map(tuple),
    text,
    st.lists(st.builds(ToolCall, text, text), max_size=2).map(tuple),
    text,
    st.booleans(),
)
texts = st.lists(text, max_size=3).map(tuple)
examples = st.builds(
    Example, text, text, text, text, st.lists(messages, max_size=4).map(tuple), texts, text, texts, text, texts, text,
    text, st.dictionaries(text, text, max_size=3), texts,
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(st.lists(examples, max_size=4))
def test_round_trip_through_arrow_is_exact(values: list[Example]):
    rows = [example_to_row(value) for value in values]
    table = pa.Table.from_pylist(rows, schema=instructions_schema())
    assert [row_to_example(row) for row in table.to_pylist()] == values
    assert [row_to_example(row) for row in rows] == values


def test_a_history_is_a_list_of_items_and_older_rows_have_none():
    turns = (Message("user", (history(("318", "50")), history(()), TextPart("Which?"))),)
    row = example_to_row(Example("s/1", "s", "instruction", "train", turns, ("a",), "none"))
    assert row["histories"] == [["318", "50"], []] and row["images"] == []
    kinds = [part["type"] for part in row["messages"][0]["content"]]
    assert kinds == ["behaviour", "behaviour", "text"]
    old = example_to_row(Example("s/2", "s", "instruction", "train", (Message("user", (TextPart("?"),)),), (), "none"))
    del old["histories"]
    assert row_to_example(old).messages[0].text == "?"


def test_the_row_is_the_ecosystems_conversation():
    picture = Medium("image", "a.jpg", width=3, height=2)
    turns = (
        Message("user", (picture, TextPart("What?"))),
        Message("assistant", (), tool_calls=(ToolCall("f", '{"x": 1}'),)),
    )
    row = example_to_row(Example("s/1", "s", "vqa", "train", turns, ("a",), "none", metadata={"k": "v"}))
    assert row["messages"][0]["content"] == [{"type": "image", "text": None}, {"type": "text", "text": "What?"}]
    assert row["images"][0]["path"] == "a.jpg" and row["videos"] == []
    assert json.loads(row["messages"][1]["tool_calls"]) == [{"name": "f", "arguments": '{"x": 1}'}]
    assert json.loads(row["metadata"]) == {"k": "v"}
