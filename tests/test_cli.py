"""What every command does before its stage: the network switch."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mmtune import order
from mmtune.__main__ import main
from mmtune.signals import STOPS
from mmtune.stages import build_data, evaluate, finetune, tokenize
from mmtune.talk import json_line

STAGES = {"build-data": build_data, "tokenize": tokenize, "finetune": finetune, "eval": evaluate}


@pytest.mark.parametrize("command", [*STAGES, "run"])
@pytest.mark.parametrize("given", [True, False])
def test_offline_reaches_every_stage_and_the_libraries(tmp_path, monkeypatch, command: str, given: bool):
    seen = {}
    for name, module in STAGES.items():

        def stage(*_, name=name, offline=None, **__):
            seen[name] = (offline, os.environ.get("HF_HUB_OFFLINE"))
            return {}

        monkeypatch.setattr(module, module.__name__.rpartition(".")[2], stage)
    # Set first, so that monkeypatch knows to take back what the command sets.
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps({"run_dir": "run", "model": {"path": "m"}, "finetune": {}, "eval": {}}))
    monkeypatch.setattr("sys.argv", ["mmtune", command, str(path), *(["--offline"] if given else [])])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0
    switch = "1" if given else "0"
    expected = {name: (None if name == "build-data" else given, switch) for name in STAGES}
    assert seen == (expected if command == "run" else {command: expected[command]})


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({}, "no model in the recipe: stopped after build-data"),
        ({"model": {"path": "m"}}, "neither finetune nor eval in the recipe: stopped after tokenize"),
        ({"model": {"path": "m"}, "eval": {}}, None),
        (
            {"pretrain": {"build": {"text": "m", "encoders": {"image": {}}}}},
            "neither finetune nor eval in the recipe: stopped after pretrain",
        ),
    ],
)
def test_a_run_that_tunes_and_scores_nothing_says_where_it_stopped(tmp_path, monkeypatch, capsys, sections, said):
    monkeypatch.setattr(order, "run_stages", lambda *_, **__: {})
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps({"run_dir": "run", **sections}))
    monkeypatch.setattr("sys.argv", ["mmtune", "run", str(path)])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0
    assert capsys.readouterr().err == (f"note: {said}\n" if said else "")


@pytest.mark.parametrize("place", ["recipe", "run_dir", "source"])
def test_a_path_that_cannot_be_one_is_named_without_a_traceback(tmp_path, monkeypatch, capsys, place: str):
    long = "a" * 300
    table = {"id": "a", "reader": "table", "split": "train", "path": f"{long if place == 'source' else 'a'}.jsonl"}
    (tmp_path / "a.jsonl").write_text('{"q": "one", "a": "two"}\n')
    path = tmp_path / "recipe.yaml"
    path.write_text(
        json.dumps(
            {
                "run_dir": long if place == "run_dir" else "run",
                "sources": [table | {"columns": {"question": "q", "answer": "a"}}],
            }
        )
    )
    asked = tmp_path / f"{long}.yaml" if place == "recipe" else path
    monkeypatch.setattr("sys.argv", ["mmtune", "build-data", str(asked)])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == (2 if place == "run_dir" else 3)
    said = capsys.readouterr().err
    assert "File name too long" in said
    assert said.startswith("error: ")
    assert not (tmp_path / "run" / "instructions").exists()


def test_init_dry_run_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["mmtune", "init", "quickstart", "--dry-run", "--json"])
    with pytest.raises(SystemExit) as ended:
        main()
    out = capsys.readouterr()
    assert ended.value.code == 0 and json.loads(out.out)["dry_run"] and not list(tmp_path.iterdir())


@pytest.fixture
def handlers():
    """Puts back what answers signals."""
    before = {each: signal.getsignal(each) for each in STOPS}
    yield
    for each, handler in before.items():
        signal.signal(each, handler)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGHUP, 75), (signal.SIGINT, 130)])
def test_a_signal_ends_any_command_with_its_code_and_one_document(
    tmp_path, monkeypatch, capsys, handlers, number, code
):
    def stage(*_, **__):
        signal.raise_signal(number)

    monkeypatch.setattr(tokenize, "tokenize", stage)
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps({"run_dir": "run", "model": {"path": "m"}}))
    monkeypatch.setattr("sys.argv", ["mmtune", "tokenize", str(path), "--json"])
    with pytest.raises(SystemExit) as ended:
        main()
    out = capsys.readouterr()
    assert ended.value.code == code and "Traceback" not in out.err
    assert json.loads(out.out)["error"]["exit_code"] == code


STOPPED_INSIDE = """
from mmtune.__main__ import main
from mmtune.stages import tokenize
def stage(*_, **__):
    {body}
tokenize.tokenize = stage
main()
"""
IMPORTED = """
import signal
signal.raise_signal(signal.SIGTERM)
with open("imported", "w"): pass
"""


def end_inside(tmp_path, body, imported, seconds):
    """Runs a command that a signal stops in the middle of ``body``; it ends in time and says so."""
    (tmp_path / "stopped.py").write_text(STOPPED_INSIDE.format(body=body))
    (tmp_path / "imported.py").write_text(imported)
    (tmp_path / "recipe.yaml").write_text(json.dumps({"run_dir": "run", "model": {"path": "m"}}))
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path(__file__).parents[1])])}
    command = [sys.executable, "-m", "stopped", "tokenize", "recipe.yaml", "--json"]
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=seconds)
    assert done.returncode == json.loads(done.stdout)["error"]["exit_code"] == 75, done.stderr


@pytest.mark.parametrize(
    "body",
    [
        pytest.param("exec('import signal; signal.raise_signal(signal.SIGTERM)')", id="text that runs"),
        pytest.param("import time, imported; time.sleep(60)", id="an import"),
    ],
)
def test_a_signal_in_the_middle_of_what_libraries_do_keeps_its_code(tmp_path, body):
    end_inside(tmp_path, body, IMPORTED, 100)
    # Some modules of C++ end the process when an exception comes out of them.
    assert (tmp_path / "imported").exists() == ("imported" in body)


LONG_IMPORT = """
import signal, time
signal.raise_signal(signal.SIGTERM)
for _ in range(600): time.sleep(0.1)
"""


def test_an_import_that_takes_long_does_not_put_off_the_end(tmp_path):
    """A scheduler kills after a while what it asked to stop, and slow disks take longer than that to import from."""
    end_inside(tmp_path, "import imported", LONG_IMPORT, 18)


LATE = """
import atexit, signal
from mmtune.__main__ import main
atexit.register(signal.raise_signal, signal.SIGTERM)
main()
"""


def test_a_signal_after_the_end_changes_nothing():
    done = subprocess.run([sys.executable, "-c", LATE, "--version"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("mmtune ")


@pytest.mark.parametrize("number", STOPS)
def test_a_second_signal_while_the_first_is_answered_changes_nothing(tmp_path, monkeypatch, capsys, handlers, number):
    def said(document):
        signal.raise_signal(number)
        return json_line(document)

    monkeypatch.setattr(tokenize, "tokenize", lambda *_, **__: signal.raise_signal(number))
    monkeypatch.setattr("mmtune.__main__.json_line", said)
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps({"run_dir": "run", "model": {"path": "m"}}))
    monkeypatch.setattr("sys.argv", ["mmtune", "tokenize", str(path), "--json"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == json.loads(capsys.readouterr().out)["error"]["exit_code"]


def test_a_command_under_nohup_does_not_hear_that_the_terminal_is_gone(monkeypatch):
    before = {each: signal.signal(each, signal.SIG_IGN if each == signal.SIGHUP else signal.SIG_DFL) for each in STOPS}
    monkeypatch.setattr("sys.argv", ["mmtune", "--version"])
    try:
        with pytest.raises(SystemExit):
            main()
        signal.raise_signal(signal.SIGHUP)
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def test_what_a_library_prints_is_no_part_of_the_document(tmp_path, monkeypatch, capsys):
    def noisy(recipe, **_):
        print("[WARNING] a library speaks")
        return {"stage": "build-data"}

    monkeypatch.setattr(build_data, "build_data", noisy)
    (tmp_path / "r.yaml").write_text("run_dir: x\n")
    for name in ("build-data", "build-instructions"):
        monkeypatch.setattr("sys.argv", ["mmtune", name, str(tmp_path / "r.yaml"), "--json"])
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        assert not ended.value.code and json.loads(said.out)["ok"]
        assert "a library speaks" in said.err


@pytest.mark.parametrize(
    ("error", "code"),
    [(ZeroDivisionError("by zero"), None), (FileNotFoundError(2, "No usable temporary directory found in ['/x']"), 5)],
)
def test_a_failure_that_nobody_foresaw_is_one_document_too(tmp_path, monkeypatch, capsys, error, code):
    def stage(*_, **__):
        raise error

    monkeypatch.setattr(build_data, "build_data", stage)
    (tmp_path / "recipe.yaml").write_text("run_dir: run\n")
    monkeypatch.setattr("sys.argv", ["mmtune", "build-data", str(tmp_path / "recipe.yaml"), "--json"])
    with pytest.raises(SystemExit if code else ZeroDivisionError):
        main()
    document = json.loads(capsys.readouterr().out)["error"]
    assert document["exit_code"] == (code or 1)
    assert document["message"] == (
        "no temporary folder can be written" if code else "a bug of mmtune: ZeroDivisionError: by zero"
    )


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"metrics": ["exact_macht"]}, "unknown metric 'exact_macht'"),
        ({"fail_under": {"vqa_accuracy": 0.6}}, "would never fail, scores are of 100"),
        ({"split": "test"}, "eval.split is 'test', the sources have train alone"),
    ],
)
def test_what_eval_would_end_with_is_said_before_the_first_stage(tmp_path, monkeypatch, capsys, asked, said):
    (tmp_path / "a.jsonl").write_text('{"q": "one", "a": "two"}\n')
    table = {"id": "a", "reader": "table", "path": "a.jsonl", "columns": {"question": "q", "answer": "a"}}
    recipe = {"run_dir": "run", "model": {"path": "m"}, "sources": [table], "finetune": {}, "eval": asked}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    monkeypatch.setattr("sys.argv", ["mmtune", "run", str(tmp_path / "recipe.yaml")])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2 and said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_a_further_adapter_that_is_not_there_is_named_before_the_first_stage(tmp_path, monkeypatch, capsys, more):
    (tmp_path / "a.jsonl").write_text('{"q": "one", "a": "two"}\n')
    table = {"id": "a", "reader": "table", "path": "a.jsonl", "columns": {"question": "q", "answer": "a"}}
    asked = {"split": "train", "ensemble": {"adapters": ["gone/adapter", "other/adapter"]}}
    recipe = {"run_dir": "run", "model": {"path": "m"}, "sources": [table], "finetune": {}, "eval": asked}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    monkeypatch.setattr("sys.argv", ["mmtune", "run", str(tmp_path / "recipe.yaml"), *more])
    with pytest.raises(SystemExit) as end:
        main()
    said = capsys.readouterr().err
    assert end.value.code == 3 and f"{tmp_path / 'gone' / 'adapter'} is not there" in said
    assert "name folders of finished adapters" in said and "mmtune finetune" not in said
    assert not (tmp_path / "run").exists()


def shell(command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a command line of bash in which ``mmtune`` is this checkout's."""
    own = f'mmtune() {{ "{sys.executable}" -m mmtune "$@"; }}; {command}'
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent.parent), **environment}
    return subprocess.run(["bash", "-c", own], env=env, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("command", ["init", "keys", "build-data --help", "build-data gone.yaml --json"])
def test_nobody_who_reads_on_is_141(command: str):
    # `true` has ended long before Python has begun.
    found = shell(f"mmtune {command} | true; exit ${{PIPESTATUS[0]}}")
    assert found.returncode == 141, found.stderr
    assert "Traceback" not in found.stderr and "ignored" not in found.stderr


@pytest.mark.parametrize(
    ("redirected", "code", "said"),
    [
        ("keys >&-", 0, ""),
        ("keys >/dev/full", 5, "error: writing failed: No space left on device"),
        ("build-data gone.yaml --json >/dev/full", 2, "error: the recipe gone.yaml is not there"),
        ("build-data gone.yaml --json >&- 2>&-", 2, ""),
        ("build-data gone.yaml 2>/dev/full", 2, ""),
    ],
)
def test_streams_that_are_closed_or_full_change_no_code(redirected: str, code: int, said: str):
    found = shell(f"mmtune {redirected}")
    assert found.returncode == code and said in found.stderr
    assert "Traceback" not in found.stderr and "ignored" not in found.stderr


def test_a_document_is_json_in_the_letters_of_any_stream():
    for environment in ({"PYTHONIOENCODING": "ascii"}, {"PYTHONIOENCODING": "utf-8"}):
        found = shell("mmtune build-data 'ümläut 日.yaml' --json", **environment)
        assert found.returncode == 2 and "ümläut 日" in json.loads(found.stdout)["error"]["message"]


def test_what_is_gone_is_named(tmp_path: Path):
    (tmp_path / "omni.yaml").symlink_to("/nowhere/omni.yaml")
    found = shell(f"cd '{tmp_path}' && mmtune init omni")
    assert found.returncode == 3 and "omni.yaml: No such file or directory" in found.stderr
    for command in ("init omni", "build-data"):
        found = shell(f"mkdir '{tmp_path}/here' && cd '{tmp_path}/here' && rmdir '{tmp_path}/here' && mmtune {command}")
        assert found.returncode in (2, 3) and found.stderr.startswith("error: ")


def test_every_command_is_told_in_full_in_the_list_of_commands():
    told = shell("mmtune --help", COLUMNS="80").stdout.partition("Commands:\n")[2].partition("\n\n")[0]
    assert len(told.splitlines()) >= 13 and "..." not in told


def test_the_list_of_recipes_says_which_are_for_data_of_ones_own():
    found = shell("mmtune init")
    told = re.search(r"init NAME copies one; (\w+) and (\w+) are for data of your own", found.stderr)
    names = [line.split()[0] for line in found.stdout.splitlines()]
    assert told and set(told.groups()) <= set(names) and "init" not in names


@pytest.mark.parametrize(
    ("given", "kept"),
    [({}, "5000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)],
    ids=["unset", "own count", "own policy"],
)
def test_threads_wait_briefly_for_each_other_unless_told_otherwise(
    monkeypatch, given: dict[str, str], kept: str | None
):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        # Set first, so that monkeypatch knows to take back what the command sets.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.argv", ["mmtune", "--version"])
    with pytest.raises(SystemExit):
        main()
    assert os.environ.get("GOMP_SPINCOUNT") == kept


@pytest.mark.parametrize(("given", "kept"), [(None, "256"), ("7", "7")], ids=["unset", "own"])
def test_onednn_keeps_few_kernels_unless_told_otherwise(monkeypatch, given: str | None, kept: str):
    name = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
    monkeypatch.setenv(name, given or "")
    if given is None:
        monkeypatch.delenv(name)
    monkeypatch.setattr("sys.argv", ["mmtune", "--version"])
    with pytest.raises(SystemExit):
        main()
    assert os.environ[name] == kept
