r"""Any dataset of the ``datasets`` library: a saved folder, a local folder, or a hub id.

``path: some/folder`` written by ``save_to_disk``, or ``path: HuggingFaceM4/ChartQA`` with
``subset: train``. A row as it comes::

    {"image": {"bytes": b"\x89PNG...", "path": null}, "query": "How many food item is shown ...",
     "label": ["14"], "human_or_machine": 0}

With ``columns`` the rows are read like those of ``table``. Without, a ``messages`` or
``conversations`` column is read like the formats of these names, a ``chosen`` or ``completion`` column as ``messages``
does; ``messages`` that are strings with ``<image>`` beside media, as LLaMA-Factory has them, as ``sharegpt`` does.
Media are never decoded here; their stored bytes travel with the rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mmtune.errors import CapabilityError, DataError, RecipeError
from mmtune.hub import look_here_without_hub
from mmtune.readers.conversation import PLACEHOLDER, media_columns
from mmtune.readers.fields import as_object
from mmtune.readers.messages import message_record
from mmtune.readers.sharegpt import sharegpt_record
from mmtune.readers.source import Row, SourceFiles, read_rows
from mmtune.readers.table import check_columns, table_record
from mmtune.records import Record, Reject

_SPLIT_NAMES = {"train": ("train",), "val": ("validation", "val", "valid", "dev"), "test": ("test",)}


def read_hf(source: SourceFiles) -> Iterator[Record | Reject]:
    """Yields one record per row.

    Raises:
        RecipeError: ``path`` is missing, or nothing says which columns to read.
        CapabilityError: The dataset is not on this machine and the hub cannot be reached.
        DataError: There is no such split.
    """
    if source.path is None:
        raise RecipeError(f"source {source.id!r} needs `path`", "a folder, or a hub id such as org/name", "missing_key")
    dataset = _split(_load(source), source)
    names = dataset.column_names
    teach = {"answer", "output", "target", "references"} & set(source.columns)
    if not teach and "messages" in names:
        make = _messages_record
    elif not teach and "conversations" in names:
        make = sharegpt_record
    elif not teach and {"chosen", "completion"} & set(names):
        make = message_record
    else:
        check_columns(source)
        make = table_record
    own = "" if make is table_record else "id"
    rows = _rows(dataset, str(source.path))
    yield from read_rows(rows, lambda row: [make(source, row)], source=source, id_column=own)


def _messages_record(source: SourceFiles, row: Row) -> Record:
    """Returns the conversation of a row whose ``messages`` mark media by parts or by placeholders in strings."""
    value = as_object(row.value)
    turns = value.get("messages")
    strings = [turn.get("content") for turn in turns if isinstance(turn, Mapping)] if isinstance(turns, list) else []
    marked = all(isinstance(text, str) for text in strings) and any(PLACEHOLDER.search(str(text)) for text in strings)
    listed = any(media_columns(source, value).values())
    return sharegpt_record(source, row) if marked and listed else message_record(source, row)


def _rows(dataset: Any, name: str) -> Iterator[Row]:
    index = 0
    # The arrow format gives media as they are stored: bytes and path, not decoded.
    for batch in dataset.with_format("arrow").iter(batch_size=64):
        for value in batch.to_pylist():
            yield Row(f"{name}#{index}", index, value)
            index += 1


def _load(source: SourceFiles) -> Any:
    path = source.path
    assert path is not None
    # Before the library is imported, which reads once whether to ask the hub.
    look_here_without_hub(str(path))
    import datasets

    try:
        if path.is_dir() and any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
            return datasets.load_from_disk(str(path))
        return datasets.load_dataset(str(path), source.name)
    except (ConnectionError, TimeoutError, FileNotFoundError) as error:
        if path.is_absolute() and not path.exists():
            raise DataError(f"{path} is not there", "check the path, or give a hub id", "file_missing") from error
        if path.exists():
            raise DataError(
                f"{path} holds no dataset that can be read: {error}", "check the folder", "bad_dataset"
            ) from error
        raise CapabilityError(
            f"the dataset {str(path)!r} is not on this machine and the hub did not give it",
            "check the id and the network, or save it with `save_to_disk` and give the folder",
            "hub_unreachable",
        ) from error
    except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"{path} is no dataset that can be read: {error}", "check path and name", "bad_dataset"
        ) from error


def _split(dataset: Any, source: SourceFiles) -> Any:
    if not hasattr(dataset, "keys"):
        return dataset
    wanted = (source.subset,) if source.subset else _SPLIT_NAMES[source.split]
    for name in wanted:
        if name in dataset:
            return dataset[name]
    if len(dataset) == 1 and source.subset is None:
        return next(iter(dataset.values()))
    raise DataError(
        f"{source.path} has no split {wanted[0]!r}", f"set `subset` to one of: {', '.join(dataset)}", "split_missing"
    )
