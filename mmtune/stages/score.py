"""score: a predictions file against references, without a model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mmtune.errors import DataError, RecipeError

VQA = "vqa"
BLEU = "bleu"
_EXAMPLE = 'expected rows like {"id": "1", "prediction": "cat"}'


def score(
    metric: str,
    *,
    predictions: Path,
    questions: Path | None = None,
    annotations: Path | None = None,
    references: Path | None = None,
) -> dict[str, Any]:
    """Returns the scores of a predictions file.

    Args:
        metric: ``vqa`` for the official VQA evaluation, ``bleu``, or the name of a metric.
        predictions: For ``vqa`` the official results ``[{"question_id", "answer"}]``, plain or
            gzipped, or a report's predictions.jsonl. For the others rows of ``id`` and
            ``prediction``, with ``references`` unless they are in a file of their own.
        questions: Official questions file; checked against the annotations.
        annotations: Official annotation file.
        references: Rows of ``id`` and ``references``.

    Raises:
        RecipeError: The metric is unknown, or a file that it needs is not named.
        DataError: Predictions and references do not belong together, or a file is damaged.
    """
    if metric == VQA or (metric == "vqa_accuracy" and annotations is not None):
        return _score_vqa(predictions, questions, annotations)
    return _score_texts(metric, predictions, references)


def _score_vqa(predictions: Path, questions: Path | None, annotations: Path | None) -> dict[str, Any]:
    from mmtune.evaluation.vqa import NORMALISER, VqaQuestion, score_vqa

    if annotations is None:
        raise RecipeError(
            "score vqa needs the official annotation file",
            "add --annotations v2_mscoco_val2014_annotations.json (and --questions)",
            "missing_option",
        )
    annotated = [
        VqaQuestion(
            question_id=_question_id(row, where),
            answers=_human_answers(row, where),
            question_type=str(row.get("question_type", "")),
            answer_type=str(row.get("answer_type", "")),
        )
        for where, row in _array(annotations, "annotations", ("question_id", "answers"))
    ]
    if not annotated:
        raise DataError(f"{annotations} has no annotations", "check the file", "empty_input")
    wanted = {question.question_id for question in annotated}
    _refuse_repeated(len(annotated), wanted, annotations)
    if questions is not None:
        asked = {_question_id(row, where) for where, row in _array(questions, "questions", ("question_id",))}
        _same_ids(asked, wanted, f"{questions.name} and {annotations.name}", "questions", "annotations")
    answers, model = _vqa_answers(predictions)
    _same_ids(wanted, set(answers), str(predictions), "the annotated questions", "the predictions")
    found = score_vqa(answers, annotated)
    found.pop("perQuestion")
    result = {"metric": VQA, **found, "n": len(annotated), "missing": 0, "normaliser": NORMALISER}
    return {**result, "model": model} if model else result


def _vqa_answers(path: Path) -> tuple[dict[int, str], str]:
    """Returns answers by question id, and the model they are from where the file names models."""
    answers: dict[int, str] = {}
    kept, model = _one_model(_rows(path))
    for where, row in kept:
        official = "question_id" in row
        text = row.get("answer" if official else "prediction")
        if not isinstance(text, str):
            raise DataError(
                f"{where} has no text in {'answer' if official else 'prediction'!r}",
                'expected rows like {"question_id": 42, "answer": "yes"}',
                "wrong_layout",
            )
        number = _question_id(row, where) if official else _number_in_id(row, where)
        if number in answers:
            raise DataError(f"{path} answers question {number} twice", "keep one answer per question", "duplicate_id")
        answers[number] = text
    return answers, model


def _one_model(rows: Iterator[tuple[str, Mapping[str, Any]]]) -> tuple[list[tuple[str, Mapping[str, Any]]], str]:
    """Returns the rows of one model: a report holds several, of which ``tuned`` is scored."""
    kept = list(rows)
    models = sorted({str(row["model"]) for _, row in kept if "model" in row})
    if not models:
        return kept, ""
    model = "tuned" if "tuned" in models else models[-1]
    return [(where, row) for where, row in kept if str(row.get("model")) == model], model


def _question_id(row: Mapping[str, Any], where: str) -> int:
    value = row["question_id"]
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str) and value.isascii() and value.isdigit():
        return int(value)
    raise DataError(f"{where}: question_id is {value!r}, a whole number is expected", "check the file", "wrong_layout")


def _human_answers(row: Mapping[str, Any], where: str) -> tuple[str, ...]:
    answers = row["answers"]
    if isinstance(answers, list) and answers and all(isinstance(answer, Mapping) for answer in answers):
        texts = tuple(answer.get("answer") for answer in answers)
        if all(isinstance(text, str) for text in texts):
            return texts
    raise DataError(
        f"{where} has no list of human answers", 'expected "answers": [{"answer": "yes", ...}, ...]', "wrong_layout"
    )


def _number_in_id(row: Mapping[str, Any], where: str) -> int:
    """Returns the official question id of an example id such as ``vqa/262148000``."""
    last = str(row.get("id", "")).rpartition("/")[2]
    if not (last.isascii() and last.isdigit()):
        raise DataError(
            f"{where}: no question id in {row.get('id')!r}",
            "VQA predictions have ids like vqa/262148000",
            "wrong_layout",
        )
    return int(last)


def _refuse_repeated(count: int, ids: set[int], path: Path) -> None:
    if count != len(ids):
        raise DataError(f"{path} holds {count - len(ids):,} question ids twice", "fetch the file again", "duplicate_id")


def _same_ids(left: set[Any], right: set[Any], what: str, left_name: str, right_name: str) -> None:
    """Raises DataError unless two sets of ids are equal, as the official script demands."""
    missing, extra = left - right, right - left
    if not (missing or extra):
        return
    lines = []
    if missing:
        lines.append(f"{len(missing):,} of {left_name} are missing from {right_name} (such as {min(missing)})")
    if extra:
        lines.append(f"{len(extra):,} of {right_name} are not among {left_name} (such as {min(extra)})")
    raise DataError(
        f"{what}: " + "; ".join(lines), "score a complete file: one answer for every question, no others", "ids_differ"
    )


def _score_texts(metric: str, predictions: Path, references: Path | None) -> dict[str, Any]:
    from mmtune.evaluation import NORMALISERS, check_metric, corpus_bleu, measure
    from mmtune.evaluation.intervals import bootstrap
    from mmtune.evaluation.vqa import few_references

    if metric != BLEU:
        check_metric(metric, (VQA, BLEU))
    kept, model = _one_model(_rows(predictions))
    given = _by_id(kept, predictions)
    if not given:
        raise DataError(f"{predictions} has no rows", "check the file", "empty_input")
    wanted = _references(given, references, predictions)
    texts = [_text(row, where) for where, row in given.values()]
    options = [_options(row, where) for where, row in given.values()]
    result: dict[str, Any] = {"metric": metric, "n": len(texts), "normaliser": NORMALISERS[metric]}
    if model:
        result["model"] = model
    if metric == BLEU:
        return {**result, "value": round(corpus_bleu(texts, wanted), 4)}
    measured = measure(metric, texts, wanted, options)
    groups = [str(row.get("group") or name) for name, (_, row) in given.items()]
    found = bootstrap(measured.values, weights=measured.weights, groups=groups, most=measured.most)
    if measured.name == "vqa_accuracy" and (notes := few_references(wanted)):
        result["note"] = notes[0]
    numbers = {key: round(getattr(found, key), 4) for key in ("value", "low", "high")}
    return {**result, **numbers, "higher_is_better": measured.higher_is_better}


def _references(
    given: Mapping[str, tuple[str, Mapping[str, Any]]], file: Path | None, predictions: Path
) -> list[list[str]]:
    """Returns the references of every prediction, from the rows themselves or a file of their own."""
    if file is None:
        sources = {name: (where, row) for name, (where, row) in given.items()}
    else:
        sources = _by_id(_rows(file), file)
        _same_ids(set(sources), set(given), str(predictions), f"the ids of {file.name}", "the predictions")
    out = []
    for name in given:
        where, row = sources[name]
        value = row.get("references")
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
            raise DataError(
                f"{where} has no references, a list of texts",
                'expected rows like {"id": "1", "prediction": "cat", "references": ["cat"]}, or --references FILE',
                "no_references",
            )
        out.append(texts)
    return out


def _by_id(rows: Iterable[tuple[str, Mapping[str, Any]]], path: Path) -> dict[str, tuple[str, Mapping[str, Any]]]:
    """Returns rows with their places by id, which may stand once in a file."""
    kept = list(rows)
    found = {_id(row, where): (where, row) for where, row in kept}
    if len(found) != len(kept):
        raise DataError(f"{path} has {len(kept) - len(found):,} ids twice", "keep one row per id", "duplicate_id")
    return found


def _id(row: Mapping[str, Any], where: str) -> str:
    value = row.get("id")
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise DataError(f"{where} has no id, a text or a whole number", _EXAMPLE, "wrong_layout")
    return str(value)


def _text(row: Mapping[str, Any], where: str) -> str:
    if not isinstance(row.get("prediction"), str):
        raise DataError(f"{where} has no text in 'prediction'", _EXAMPLE, "wrong_layout")
    return str(row["prediction"])


def _options(row: Mapping[str, Any], where: str) -> list[str]:
    options = row.get("options") or []
    if not isinstance(options, list) or not all(isinstance(option, str) for option in options):
        raise DataError(f"{where}: 'options' is no list of texts", "mend the row, or leave options out", "wrong_layout")
    return options


def _array(path: Path, key: str, needed: tuple[str, ...]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    from mmtune.readers.strict_json import stream_arrays

    for name, item in stream_arrays(path, (key,)):
        if name == key:
            where, row = _whole(item)
            for field in needed:
                if field not in row:
                    raise DataError(
                        f"{where} has no {field!r}", f"check that {path} is the official file", "wrong_layout"
                    )
            yield where, row


def _rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    from mmtune.readers.strict_json import iter_items

    for item in iter_items(path):
        yield _whole(item)


def _whole(item: Any) -> tuple[str, Mapping[str, Any]]:
    """Returns place and fields of a row, refusing the file when one row is damaged: a score needs all."""
    from mmtune.records import Reject

    if isinstance(item, Reject):
        raise DataError(f"{item.where}: {item.detail}", "mend or fetch the file again; nothing was scored", item.reason)
    if not isinstance(item.value, Mapping):
        raise DataError(f"{item.where} is no object", "check the file", "wrong_layout")
    return item.where, item.value
