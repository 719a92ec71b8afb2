"""The omni base's lessons say what is true of the media of the train splits."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.test_bundled_data import load_script, scenes_of, truth
from tests.test_bundled_sounds_and_clips import rows_of


@pytest.fixture(scope="module")
def lessons(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """All lessons by their kind."""
    path: Path = tmp_path_factory.mktemp("lessons") / "lessons.jsonl"
    load_script("make_lessons").write_lessons(path)
    found: dict[str, list[dict[str, Any]]] = {}
    for line in path.read_text("utf-8").splitlines():
        row = json.loads(line)
        found.setdefault(row["id"].split("-")[0], []).append(row)
    return found


def taught(lesson: dict[str, Any]) -> tuple[dict[str, str], list[tuple[str, str]]]:
    """Its media by their kind, and its questions with their answers."""
    turns, media = lesson["messages"], {}
    for part in turns[0]["content"][:-1]:
        media[part["type"]] = part["path"]
    said = [turn["content"][-1]["text"] for turn in turns]
    return media, list(zip(said[::2], said[1::2], strict=True))


def test_questions_about_sounds_and_pictures_are_true(lessons: dict[str, list[dict[str, Any]]]) -> None:
    spoken: dict[str, dict[str, str]] = {}
    for row in rows_of("sounds", "train"):
        spoken.setdefault(row["audio"], {})[row["question"]] = row["answer"]
    digit_of = {row["audio"]: row["answer"] for row in rows_of("sounds", "train") if row["question_type"] == "digit"}
    for lesson in lessons["sound"]:
        media, turns = taught(lesson)
        assert len(turns) in (1, 3)
        assert all(spoken[media["audio"]][question] == answer for question, answer in turns)
    verdicts: Counter[str] = Counter()
    scenes = {image: scene["digits"] for image, scene in scenes_of("train").items()}
    for lesson in lessons["match"]:
        media, turns = taught(lesson)
        (shown,) = scenes[int(media["image"].removesuffix(".png"))]
        said = digit_of[media["audio"]]
        for question, answer in turns:
            if question.startswith("Is the digit"):
                assert answer == ("yes" if str(shown["digit"]) == said else "no")
                verdicts[answer] += 1
            else:
                assert answer == (str(shown["digit"]) if question == "What digit is this?" else said)
    assert sum(verdicts.values()) == len(lessons["match"]) and abs(verdicts["yes"] - verdicts["no"]) < 300


def test_questions_about_clips_are_true(lessons: dict[str, list[dict[str, Any]]]) -> None:
    rows = rows_of("clips", "train")
    digits_of = {row["video"]: [str(digit) for digit in row["shown"]["digits"]] for row in rows}
    asked = {(row["video"], row["question"]): row["answer"] for row in rows}
    kinds: Counter[str] = Counter()
    for lesson in [*lessons["order"], *lessons["way"]]:
        media, turns = taught(lesson)
        digits = digits_of[media["video"]]
        for question, answer in turns:
            words = question.removesuffix("?").split()
            side = words[-3]
            kinds[side] += 1
            if side in ("after", "before"):
                assert answer == digits[digits.index(words[-1]) + (1 if side == "after" else -1)]
            else:
                assert asked[media["video"], question] == answer
    assert min(kinds["after"], kinds["before"]) > 1500


def test_questions_about_scenes_are_true(lessons: dict[str, list[dict[str, Any]]]) -> None:
    scenes = scenes_of("train")
    for lesson in lessons["scene"]:
        media, turns = taught(lesson)
        scene = scenes[int(media["image"].removesuffix(".png"))]
        assert all(answer == truth(question, scene) for question, answer in turns if "caption" not in question)
