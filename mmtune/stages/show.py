"""show: what is in a stage folder or a run, for people and for programs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mmtune.errors import DataError
from mmtune.prompts.delimiters import DELIMITERS
from mmtune.prompts.schema import COLUMN
from mmtune.records import SOFT_ID
from mmtune.storage import is_finished, open_split, read_manifest, verify_files

_STAGES = ("features", "instructions", "prompt", "start", "tokens", "base", "adapter", "report", "exported")
_TRAINED = ("pretrain", "finetune")
_LONGEST = 140
"""Characters of a fact or a value on one line."""


def describe(path: Path, *, row: int = 0, split: str | None = None) -> dict[str, Any]:
    """Returns manifest, counts and one row of a stage folder, or the state of a run.

    Of a stage folder every file is read and compared with the manifest; where a split is named, that split's alone.

    Raises:
        DataError: There is nothing of mmtune there, or no such row.
        IntegrityError: The folder is damaged.
    """
    if is_finished(path):
        return _stage(path, row, split)
    stages = {name: _brief(path / name) for name in _STAGES if is_finished(path / name)}
    stopped = {f"{command}_stopped_after_step": _stopped_at(path, command) for command in _TRAINED}
    if not stages and not any(step is not None for step in stopped.values()):
        if is_finished(path.resolve().parent):
            raise DataError(f"{path} is a part of a stage", f"mmtune show {path.parent}", "nothing_there")
        if not path.exists():
            raise DataError(f"{path} does not exist", "give a stage folder or a run_dir", "nothing_there")
        raise DataError(f"{path} holds no finished stage", "give a stage folder or a run_dir", "nothing_there")
    return {"run_dir": str(path), "stages": stages, **stopped}


def _stopped_at(run_dir: Path, command: str) -> int | None:
    """Returns the step of the newest checkpoint of a training that did not end, or None."""
    from mmtune.training.checkpoints import CheckpointFolder

    newest = CheckpointFolder(run_dir / "checkpoints" / command, 1, command).newest()
    return None if newest is None else newest.step


def _brief(folder: Path) -> dict[str, Any]:
    manifest = read_manifest(folder)
    return {"hash": manifest.hash[:12], "rows": manifest.rows, "drops": manifest.drops, "facts": manifest.facts}


def _stage(path: Path, row: int, split: str | None) -> dict[str, Any]:
    manifest = read_manifest(path)
    verify_files(path, manifest, split or "")
    result: dict[str, Any] = {
        "path": str(path),
        "stage": manifest.stage,
        "hash": manifest.hash,
        "parents": manifest.parents,
        "rows": manifest.rows,
        "drops": manifest.drops,
        "facts": manifest.facts,
        "timings": manifest.timings,
        "bytes": sum(file["size"] for file in manifest.files.values()),
    }
    if manifest.stage == "prompt":
        from mmtune.prompts.search import read_trace
        from mmtune.reports.search import search_facts

        traces = {trace.stem: read_trace(trace) for trace in sorted(path.glob("*.jsonl"), reverse=True)}
        result["searches"] = {str(lines[0].get("method", name)): search_facts(lines) for name, lines in traces.items()}
    chosen = split or next((name for name in manifest.rows if (path / name).is_dir()), None)
    if chosen is not None:
        table = open_split(path / chosen)
        if row >= table.num_rows:
            raise DataError(
                f"{path / chosen} has {table.num_rows} rows, there is no row {row}", "count from 0", "no_row"
            )
        value = table.slice(row, 1).to_pylist()[0]
        result["row"] = {"split": chosen, "index": row, **_row(value, manifest.facts)}
    return result


def _row(value: dict[str, Any], facts: dict[str, Any]) -> dict[str, Any]:
    if "input_ids" in value:
        return _tree(value, facts)
    if "pooled" in value:
        tokens = value.pop("tokens", None)
        shape = [] if tokens is None else [len(tokens), len(tokens[0]) if tokens else 0]
        vectors = [name for name in ("pooled", "reduced") if name in value]
        short: dict[str, Any] = {name: [round(number, 4) for number in value[name]] for name in vectors}
        return {**value, **short, "tokens_shape": shape}
    for name in ("images", "audios", "videos"):
        value[name] = [{**item, "bytes": None} for item in value.get(name) or ()]
    return value


def _tree(value: dict[str, Any], facts: dict[str, Any]) -> dict[str, Any]:
    """Returns a tree as text per run of equal branch and loss, media tokens counted instead of spelt."""
    from mmtune.encoding.processor import load_processor, tokenizer_of

    model, start = Path(facts["model"]), Path(facts["model"]).parent / "start"
    # A base that is still to be trained has its processor with its untrained parts.
    path = start if not model.is_dir() and start.is_dir() else facts["model"]
    tokenizer = tokenizer_of(load_processor(str(path), offline=True))
    spans = sorted((item["start"], item["start"] + item["length"], item) for item in value["media"])
    runs: list[dict[str, Any]] = []
    at = 0
    ids, labels, branch = value["input_ids"], value["labels"], value["branch"]
    while at < len(ids):
        span = next((span for span in spans if span[0] == at and span[1] > at), None)
        if span is not None:
            runs.append(
                {
                    "branch": branch[at],
                    "loss": False,
                    "text": f"[{span[2]['path'] or span[2]['modality']}: {span[2]['length']} tokens]",
                }
            )
            at = span[1]
            continue
        end = at + 1
        starts = {span[0] for span in spans}
        same = (branch[at], labels[at] != -100, ids[at] >= SOFT_ID)
        while end < len(ids) and end not in starts and (branch[end], labels[end] != -100, ids[end] >= SOFT_ID) == same:
            end += 1
        text = f"[{end - at} soft tokens]" if same[2] else tokenizer.decode(ids[at:end])
        runs.append({"branch": same[0], "loss": same[1], "text": text})
        at = end
    return {"length": value["length"], "example_ids": value["example_ids"], "runs": runs}


_UNSAID = ("examples", "test_split", "processor_files")
"""Facts that other lines tell, or that are for programs."""


def render(result: dict[str, Any]) -> str:
    """Returns a description as plain text."""
    lines: list[str] = []
    if "stages" in result:
        for name, stage in result["stages"].items():
            lines.append(f"{name:13} {stage['hash']}  {_rows(stage)}{_drops(stage['drops'])}")
        for command in _TRAINED:
            step = result[f"{command}_stopped_after_step"]
            if step is not None:
                lines.append(f"{command:13} not finished; the newest checkpoint is after step {step:,}")
        return "\n".join(lines)
    lines.append(f"{result['path']}  ({result['stage']}, {result['bytes'] / 1e6:.1f} MB, {result['hash'][:12]})")
    if rows := _rows(result):
        lines.append(f"rows      {rows}")
    if result["drops"]:
        lines.append(f"refused   {_counts(result['drops'])}")
    lines += [line for name, value in _facts(result).items() for line in _fact_lines(name, value)]
    if "searches" in result:
        from mmtune.reports.search import search_lines

        lines += ["", *(line for name, facts in result["searches"].items() for line in search_lines(name, facts))]
    row = result.get("row")
    if row is None:
        return "\n".join(lines)
    lines.append(f"\n{row['split']} row {row['index']}:")
    if "runs" in row:
        for run in row["runs"]:
            mark = "LOSS" if run["loss"] else "    "
            lines.append(f"  {run['branch']:>3} {mark} {run['text']!r}")
    elif "pooled" in row:
        lines += [f"  {name:12} {_short(value)}" for name, value in row.items() if name not in ("split", "index")]
    else:
        media: dict[str, Iterator[Any]] = {kind: iter(row.get(column) or ()) for kind, column in COLUMN.items()}
        for message in row["messages"]:
            text = "".join(part["text"] or _medium(part["type"], media) for part in message["content"])
            lines.append(f"  {message['role']:9} {text!r}")
        delimiters = json.loads(row["metadata"]).get(DELIMITERS)
        if delimiters is not None:
            lines.append(f"  delimiters {delimiters}: the exemplars are encoded as text of the last question")
        lines.append(f"  references {row['references']}")
    return "\n".join(lines)


def _rows(stage: Mapping[str, Any]) -> str:
    """Returns the rows of every split; what a prompt was judged by goes by the name of its split."""
    from mmtune.reports.wording import rows_or_trees

    named = {_split_name(stage["facts"], split): count for split, count in stage["rows"].items()}
    return rows_or_trees(named, stage["facts"].get("examples", {}))


def _split_name(facts: Mapping[str, Any], name: str) -> str:
    return str(facts.get("test_split") or name) if name == "test" else name


def _facts(result: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the facts that the lines above them have not told."""
    facts = {name: value for name, value in result["facts"].items() if name not in _UNSAID}
    if "test_split" in result["facts"]:
        facts["scores"] = {
            who: {_split_name(result["facts"], split): found for split, found in own.items()}
            for who, own in facts["scores"].items()
        }
    if isinstance(facts.get("towers"), dict):
        facts["towers"] = {name: own for name, own in facts["towers"].items() if own.get("state") != "absent"}
    return facts


def _fact_lines(name: str, value: Any, width: int = 9, indent: str = "") -> list[str]:
    """Returns a fact on one line, or a line for each part where it would be cut or a name has a comma."""
    words = _words(value)
    if not words:
        return []
    parts = list(value.items()) if isinstance(value, dict) else []
    if isinstance(value, list) and isinstance(value[0], dict | str):
        parts = [("-", part) for part in value]
    if not parts or (len(words) <= _LONGEST and not _says_commas(value)):
        return [f"{indent}{name:{width}} {_cut(words)}"]
    longest = max(len(part) for part, _ in parts)
    told = [_fact_lines(part, own, longest, indent + "  ") for part, own in parts]
    return [f"{indent}{name}", *(line for lines in told for line in lines)]


def _says_commas(value: Any) -> bool:
    """Says whether a name inside a fact has a comma, which then parts nothing."""
    return isinstance(value, dict) and any("," in name or _says_commas(own) for name, own in value.items())


def _drops(drops: dict[str, int]) -> str:
    return f"; refused {_counts(drops)}" if drops else ""


def _counts(drops: dict[str, int]) -> str:
    return ", ".join(f"{reason} {count:,}" for reason, count in drops.items())


def _medium(kind: str, media: Mapping[str, Iterator[Any]]) -> str:
    """Returns what stands for the next medium of a kind: its file, or the items of a history."""
    shown = next(media[kind], None) if kind in media else None
    named = ", ".join(map(str, shown)) if isinstance(shown, list) else (shown or {}).get("path")
    return f"<{kind}: {named}>" if named else f"<{kind}>"


def _words(value: Any) -> str:
    """Returns a fact in words; empty for one that says nothing, such as a loss that was not taken."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, dict):
        told = [(name, own, _words(own)) for name, own in value.items()]
        return ", ".join(
            f"{name} ({words})" if isinstance(own, dict) else f"{name} {words}" for name, own, words in told if words
        )
    if isinstance(value, list):
        return ", ".join(f"({_words(own)})" if isinstance(own, dict | list) else _words(own) for own in value)
    return "" if value is None else str(value)


def _short(value: Any) -> str:
    return _cut(json.dumps(value, ensure_ascii=False, default=str))


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."
