"""Bad input through the command line: the exit code, one clear message with the next step, nothing half-written."""

import io
import json
import os
import shutil
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmtune.__main__ import main
from mmtune.recipe.text import load_recipe
from mmtune.stages.finetune import finetune
from mmtune.talk import Talk


@pytest.fixture
def mmtune(monkeypatch, capsys):
    """Returns a function that runs one command line: its exit code, stdout and stderr."""

    def run(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["mmtune", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return end.value.code, out, err

    return run


def fails(result: tuple[int, str, str], exit_code: int, code: str, *said: str) -> None:
    """Checks a failed `--json` command: one document, one message, one next step."""
    found, out, err = result
    assert found == exit_code, err
    document = json.loads(out)
    assert document["ok"] is False and document["error"]["exit_code"] == exit_code
    assert document["error"]["code"] == code
    lines = [line for line in err.splitlines() if not line.startswith(("note: ", "build-data: again, "))]
    assert [line.split(":")[0] for line in lines] == ["error", "  next"], err
    assert lines[0] == f"error: {document['error']['message']}"
    for words in said:
        assert words in err


def turns(question, answer="ok", **more) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **more}


def shown(path: str) -> dict:
    return turns([{"type": "image", "path": path}, {"type": "text", "text": "?"}])


def lines_of(*rows) -> str:
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


def recipe(folder: Path, *sources: dict, **sections) -> Path:
    """Writes a recipe with relative paths beside the data and returns its path."""
    path = folder / "recipe.yaml"
    path.write_text(json.dumps({"run_dir": "run", "sources": sources, **sections}))
    return path


CHAT = {"id": "chat", "reader": "messages", "path": "chat.jsonl"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with one sound picture and one that is cut."""
    out = io.BytesIO()
    values = np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)
    Image.fromarray(values).save(out, "JPEG")
    data = tmp_path / "data"
    data.mkdir()
    (data / "fine.jpg").write_bytes(out.getvalue())
    (data / "cut.jpg").write_bytes(out.getvalue()[:1500])
    (tmp_path / "outside.jpg").write_bytes(out.getvalue())
    return data


def left_in(folder: Path) -> list[str]:
    """Returns what a run left in its run_dir, the lock file apart."""
    run = folder / "run"
    return sorted(path.name for path in run.iterdir() if path.name != ".instructions.lock") if run.is_dir() else []


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (shown("cut.jpg"), "decode_error"),
        ('{"messages": [{"role": "user", "con', "bad_json"),
        (shown("gone.jpg"), "media_missing"),
        (shown("../outside.jpg"), "path_escape"),
        (shown("http://localhost/x.jpg"), "url_refused"),
        (turns("q", ""), "empty_answer"),
        ({**turns([{"type": "image"}]), "images": ["fine.jpg", "fine.jpg"]}, "media_mismatch"),
    ],
)
def test_a_bad_row_is_named_and_its_neighbours_are_kept(folder: Path, mmtune, bad, reason: str):
    (folder / "chat.jsonl").write_text(lines_of(shown("fine.jpg"), bad, turns("q")))
    code, out, err = mmtune("build-data", recipe(folder, CHAT), "--json")
    assert code == 0
    result = json.loads(out)
    assert result["rows"] == {"train": 2} and result["drops"] == {reason: 1}
    assert result["read"] == 3 == sum(result["rows"].values()) + result["rejected"]
    log = folder / "run" / "instructions" / "rejects.jsonl"
    (line,) = [json.loads(text) for text in log.read_text().splitlines()]
    assert (line["where"], line["reason"]) == ("chat.jsonl:2", reason) and line["detail"]
    assert f"{reason} 1" in err and str(log) in err


@pytest.mark.parametrize(
    ("placeholders", "files", "reason"), [(2, 1, "2 <image>"), (1, 2, "1 <image>"), (0, 1, "0 <image>")]
)
def test_placeholders_that_do_not_match_are_named_with_both_numbers(
    folder: Path, mmtune, placeholders: int, files: int, reason: str
):
    row = {**turns("<image>" * placeholders + "what?"), "images": ["fine.jpg"] * files}
    (folder / "chat.jsonl").write_text(lines_of(row, turns("q")))
    code, out, _ = mmtune("build-data", recipe(folder, {**CHAT, "reader": "sharegpt"}), "--json")
    assert code == 0 and json.loads(out)["drops"] == {"media_mismatch": 1}
    assert f"{reason} placeholders but {files} image file(s)" in (
        (folder / "run" / "instructions" / "rejects.jsonl").read_text()
    )


COCO = {"id": "coco", "reader": "coco_captions", "annotations": "chat.jsonl"}
TABLE = {"id": "t", "reader": "table", "path": "chat.jsonl", "columns": {"answer": "a"}}


@pytest.mark.parametrize(
    ("text", "source", "code", "said"),
    [
        (lines_of(turns("a", id="x"), turns("b", id="x")), CHAT, "duplicate_id", "'chat/x' stands twice"),
        (lines_of(turns("a", ""), turns("b", "")), CHAT, "no_rows", "empty_answer 2; the first at chat.jsonl:1: "),
        (
            lines_of("1", turns("a", ""), turns("b", "")),
            CHAT,
            "no_rows",
            "the first at chat.jsonl:2: /messages/1: the ",
        ),
        (lines_of({"query": "a", "response": "b"}), CHAT, "no_rows", "columns: {instruction: query, output: response}"),
        (lines_of(shown("gone.jpg")), CHAT, "no_rows", "check `images`, `audios` and `videos` of the sources"),
        ("", CHAT, "empty_input", "holds no rows"),
        (lines_of("[1", "2]"), {**CHAT, "path": "gone.jsonl"}, "file_missing", "gone.jsonl is not there"),
        (lines_of(turns("a")), {**CHAT, "path": "."}, "file_missing", "is a folder; a file is expected"),
        (lines_of(turns("a")), {**CHAT, "images": "gone"}, "file_missing", "`images` of source 'chat'"),
        ('{"images": [{"id": 1, "file_na', COCO, "bad_json", "the file ends in the middle"),
        ("<html>404</html>", COCO, "bad_json", "expected an object, found '<'"),
        ("[1, 2]", COCO, "wrong_layout", "holds an array; an object with 'images' is expected"),
        ('{"questions": []}', COCO, "wrong_layout", "has no 'images' array; it has questions"),
        ("\x00\x01a,b\nc,d\n", {**TABLE, "path": "t.csv"}, "bad_table", "no line of column names"),
        ("b,c\n1,2\n", {**TABLE, "path": "t.csv"}, "missing_column", "has no column 'a'"),
    ],
)
def test_what_ends_a_build_is_bad_data_and_leaves_nothing(
    folder: Path, mmtune, text: str, source: dict, code: str, said: str
):
    name = source.get("path", "chat.jsonl")
    (folder / (name if name == "t.csv" else "chat.jsonl")).write_text(text)
    fails(mmtune("build-data", recipe(folder, source), "--json"), 3, code, said)
    assert left_in(folder) == []


def test_a_failed_build_keeps_the_finished_one(folder: Path, mmtune):
    (folder / "chat.jsonl").write_text(lines_of(turns("a")))
    path = recipe(folder, CHAT)
    assert mmtune("build-data", path)[0] == 0
    manifest = (folder / "run" / "instructions" / "manifest.json").read_bytes()
    (folder / "chat.jsonl").write_text(lines_of(turns("a", "")))
    fails(mmtune("build-data", path, "--json"), 3, "no_rows")
    assert left_in(folder) == ["instructions"]
    assert (folder / "run" / "instructions" / "manifest.json").read_bytes() == manifest


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("run_dir: run\nfinetune: {max_stepz: 3}\n", "line 2: unknown key `finetune.max_stepz`; did you mean"),
        ("run_dir: run\nsources: [{id: a, reader: vqa_v2, split: dev}]\n", "'train', 'val' or 'test' (found 'dev')"),
        ("run_dir: run\nrun_dir: walk\n", "recipe.yaml:2: the key `run_dir` appears twice (first on line 1)"),
        ("seed: 1\n", "`run_dir` is required"),
        ("run_dir: [\n", "not valid YAML"),
        ("run_dir: run\nsources: [{id: a, reader: mesages, path: x}]\n", "did you mean 'messages'?"),
    ],
)
def test_a_wrong_recipe_is_a_usage_error(folder: Path, mmtune, text: str, said: str):
    (folder / "recipe.yaml").write_text(text)
    code, out, err = mmtune("build-data", folder / "recipe.yaml", "--json")
    assert code == 2 and json.loads(out)["error"]["exit_code"] == 2
    assert said in err and err.startswith("error: ") and "  next: " in err
    assert left_in(folder) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("build-data", "--limt", "2"), ("No such option: --limt", "see: mmtune build-data --help")),
        (("build-data", "--limit", "0"), ("'--limit'", "see: mmtune build-data --help")),
        (("bild-data",), ("Did you mean 'build-data'?", "see: mmtune --help")),
        (("run", "gone.yaml"), ("the recipe gone.yaml is not there", "mmtune init")),
        (("init", "quikstart"), ("no recipe named 'quikstart'", "did you mean quickstart?")),
        (("score", "exact_macht", "--predictions", "p.jsonl"), ("unknown metric", "did you mean 'exact_match'?")),
    ],
)
def test_a_wrong_command_line_is_a_usage_error(mmtune, arguments: tuple, said: tuple):
    code, out, err = mmtune(*arguments)
    assert code == 2 and out == ""
    assert len(err.splitlines()) == 2 and all(words in err for words in said)


def test_no_command_shows_the_help(mmtune):
    code, out, err = mmtune()
    assert code == 2 and out == "" and err.startswith("Usage: mmtune") and "build-data" in err and "error" not in err


@pytest.mark.parametrize("option", [(), ("--force",)])
def test_a_folder_of_somebody_else_is_never_touched(folder: Path, mmtune, option: tuple):
    (folder / "chat.jsonl").write_text(lines_of(turns("a")))
    theirs = folder / "run" / "instructions" / "thesis.txt"
    theirs.parent.mkdir(parents=True)
    theirs.write_text("years of work")
    fails(mmtune("build-data", recipe(folder, CHAT), "--json", *option), 2, "foreign_folder", "nothing was touched")
    assert left_in(folder) == ["instructions"] and list(theirs.parent.iterdir()) == [theirs]
    assert theirs.read_text() == "years of work"


def test_a_run_dir_that_is_a_file_is_never_touched(folder: Path, mmtune):
    (folder / "chat.jsonl").write_text(lines_of(turns("a")))
    (folder / "run").write_text("mine")
    fails(mmtune("build-data", recipe(folder, CHAT), "--json"), 2, "recipe", "choose another run_dir")
    assert (folder / "run").read_text() == "mine"


@contextmanager
def without_rights():
    """Takes the rights of root away where the tests run as root."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


@pytest.mark.parametrize(
    ("closed", "exit_code", "code"),
    [("chat.jsonl", 3, "unreadable"), ("media", 3, "no_rows"), ("recipe.yaml", 2, "recipe"), ("run", 2, "recipe")],
)
def test_what_may_not_be_read_or_written_is_said(mmtune, closed: str, exit_code: int, code: str):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "media").mkdir()
        (folder / "run").mkdir()
        (folder / "run").chmod(0o777)
        (folder / "media" / "a.jpg").write_bytes(b"x")
        (folder / "chat.jsonl").write_text(lines_of(shown("a.jpg")))
        path = recipe(folder, {**CHAT, "images": "media"})
        (folder / closed).chmod(0)
        with without_rights():
            result = mmtune("build-data", path, "--json")
        (folder / closed).chmod(0o755)
        said = "'a.jpg' cannot be opened: Permission denied" if closed == "media" else str(folder / closed)
        fails(result, exit_code, code, said)
        assert left_in(folder) == []


@pytest.fixture
def built(folder: Path, mmtune, tiny_vlm: Path) -> Path:
    """A recipe whose instructions/ are finished, with its own copy of a model."""
    (folder / "chat.jsonl").write_text(lines_of(turns("a"), shown("fine.jpg")))
    shutil.copytree(tiny_vlm, folder / "model")
    path = recipe(folder, CHAT, model={"path": "./model"}, eval={"split": "val"}, finetune={"max_steps": 1})
    assert mmtune("build-data", path)[0] == 0
    return path


def edit_json(path: Path, *dropped: str) -> None:
    values = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in values.items() if key not in dropped}))


def test_a_tokenizer_without_padding_token_pads_with_its_end_token(built: Path, mmtune):
    edit_json(built.parent / "model" / "tokenizer_config.json", "pad_token")
    code, out, err = mmtune("tokenize", built, "--json")
    assert code == 0, err
    assert json.loads(out)["rows"] == {"train": 2}


def test_a_model_that_cannot_be_used_is_named_before_anything_is_written(built: Path, mmtune):
    model = built.parent / "model"
    template = (model / "chat_template.jinja").read_text()
    (model / "chat_template.jinja").unlink()
    fails(mmtune("tokenize", built, "--json"), 2, "no_chat_template", "instruction-tuned")
    (model / "chat_template.jinja").write_text(template)
    edit_json(model / "tokenizer_config.json", "pad_token", "eos_token")
    fails(mmtune("tokenize", built, "--json"), 2, "no_pad_token", "set pad_token")
    (model / "tokenizer.json").write_text('{"half')
    fails(mmtune("tokenize", built, "--json"), 7, "bad_processor", str(model))
    shutil.rmtree(model)
    fails(mmtune("tokenize", built, "--json"), 2, "model_missing", f"{model} is not there")
    hub = mmtune("tokenize", built, "--json", "--offline", "--set", "model.path=nobody/nothing")
    fails(hub, 4, "model_unavailable", "nobody/nothing", "./FOLDER")
    assert left_in(built.parent) == ["instructions"]


@pytest.mark.parametrize("path", ["data/none", "models/mine/none", "none/", "./none"])
def test_a_folder_that_is_not_there_is_no_hub_id(built: Path, mmtune, path: str):
    elsewhere = built.parent / "elsewhere.yaml"
    sources = "[{id: s, reader: messages, path: none.jsonl}]"
    elsewhere.write_text(f"run_dir: other\nmodel: {{path: {path}}}\nsources: {sources}\n")
    fails(
        mmtune("run", elsewhere, "--json"), 2, "model_missing", f"{built.parent / path} is not there", "recipe's folder"
    )
    assert not (built.parent / "other").exists()


def test_stages_out_of_order_name_the_command_to_run(built: Path, mmtune):
    code, _, err = mmtune("finetune", built)
    assert code == 3 and f"next: run: mmtune tokenize {built}\n" in err
    # What was set over the recipe counts for the next command too.
    more = ("--set", "eval.answer=rank", "--seed=3", "--set=eval.ensemble={wordings: all}", "--dry-run")
    code, _, err = mmtune("finetune", built, *more)
    again = "--set eval.answer=rank --seed 3 --set 'eval.ensemble={wordings: all}'"
    assert code == 3 and f"next: run: mmtune tokenize {built} {again}\n" in err
    code, _, err = mmtune("eval", built)
    assert code == 3 and "no rows in the split 'val'; it has train (2)" in err and "add a source with" in err
    assert left_in(built.parent) == ["instructions"]


def test_a_damaged_stage_is_an_integrity_error(built: Path, mmtune):
    (data,) = (built.parent / "run" / "instructions" / "train").glob("*.arrow")
    data.write_bytes(data.read_bytes()[:100])
    code, _, err = mmtune("tokenize", built)
    assert code == 7 and data.name in err and f"next: run: mmtune build-data {built} --force" in err


def test_a_byte_that_was_changed_in_a_stage_is_found_by_the_next(built: Path, mmtune):
    (data,) = (built.parent / "run" / "instructions" / "train").glob("*.arrow")
    raw = bytearray(data.read_bytes())
    raw[len(raw) // 2] ^= 0xFF
    data.write_bytes(raw)
    said = f"{data} does not have the recorded bytes"
    named = f" {built}"
    for command, path, its in (("tokenize", built, named), ("prompt", built, named), ("show", data.parents[1], "")):
        fails(mmtune(command, path, "--json"), 7, "damaged_file", said, f"run: mmtune build-data{its} --force")
    assert [name for name in left_in(built.parent) if not name.endswith(".lock")] == ["instructions"]


def test_a_stop_while_libraries_are_imported_leaves_nothing_aside(built: Path, mmtune, monkeypatch):
    assert mmtune("tokenize", built)[0] == 0
    # Of an import that is None Python says that it failed, wherever an interrupt would have come.
    monkeypatch.setitem(sys.modules, "mmtune.training.ranks", None)
    with pytest.raises(ImportError):
        finetune(load_recipe(built), console=Talk(quiet=True))
    assert not [name for name in left_in(built.parent) if ".tmp-" in name]


@pytest.mark.parametrize(
    ("more", "key"),
    [
        ({"columns": {"answer": "a"}, "reader": "squad"}, "columns"),
        ({"questions": "chat.jsonl"}, "questions"),
        ({"subset": "train"}, "subset"),
        ({"reader": "coco_captions", "annotations": "chat.jsonl"}, "path"),
    ],
)
def test_a_key_that_the_reader_would_pass_over_is_a_usage_error(folder: Path, mmtune, more: dict, key: str):
    (folder / "chat.jsonl").write_text(lines_of(turns("a")))
    said = f"the reader {more.get('reader', 'messages')} reads no `{key}`"
    fails(mmtune("build-data", recipe(folder, {**CHAT, **more}), "--json"), 2, "unread_key", said)
    assert left_in(folder) == []


def test_a_part_into_which_nothing_falls_is_told_as_that(folder: Path, mmtune):
    (folder / "chat.jsonl").write_text(lines_of(turns("a")))
    sources = ({**CHAT, "part": [0, 0.9999]}, {**CHAT, "split": "val", "part": [0.9999, 1]})
    path = recipe(folder, *sources, model={"path": "."}, eval={"split": "val"})
    code, out, err = mmtune("run", path, "--json")
    assert code == 3 and "widen `part`" in json.loads(out)["error"]["hint"], err
    assert "(val) gave no row: nothing of it falls into part [0.9999, 1.0]" in err and "rejects" not in err


def test_a_split_of_which_nothing_is_left_ends_a_run_before_its_training(folder: Path, mmtune):
    (folder / "chat.jsonl").write_text(lines_of(turns("a")))
    (folder / "val.jsonl").write_text(lines_of(turns("a", "")))
    sources = (CHAT, {**CHAT, "split": "val", "path": "val.jsonl"})
    path = recipe(folder, *sources, model={"path": "."}, finetune={}, eval={"split": "val"})
    code, out, err = mmtune("run", path, "--json")
    assert code == 3 and json.loads(out)["error"]["code"] == "split_missing", err
    assert left_in(folder) == ["instructions"]
