"""Stage folders are complete or absent, reused when nothing changed, and never harm foreign files."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import datasets
import pyarrow as pa
import pytest

from mmtune import storage
from mmtune.errors import DataError, IntegrityError, LockedError, RecipeError, ResourceError
from mmtune.files import disk_errors
from mmtune.records import Reject
from mmtune.storage.manifest import changes

SCHEMA = pa.schema([("id", pa.string()), ("value", pa.list_(pa.int32()))])


def make(target, config, text="x", force=False, on_change="rebuild", rows=None):
    staging = storage.open_stage(target, stage="demo", config=config, force=force, on_change=on_change)
    if staging is None:
        return None
    with staging:
        (staging.path / "data.txt").write_text(text)
        return staging.publish(rows=rows, facts={"a": 1})


def test_a_stage_is_made_once_and_reused(tmp_path):
    target = tmp_path / "demo"
    first = make(target, {"k": 1})
    assert storage.read_manifest(target, verify=True) == first
    assert make(target, {"k": 1}) is None
    assert make(target, {"k": 1}, force=True).hash == first.hash


def test_a_changed_setting_rebuilds_and_says_what_changed(tmp_path):
    target = tmp_path / "demo"
    make(target, {"a": {"b": 1}})
    staging = storage.open_stage(target, stage="demo", config={"a": {"b": 2}})
    assert staging.reasons == ["config.a.b: 1 -> 2"]
    staging.__exit__()


def test_a_changed_setting_is_refused_where_asked(tmp_path):
    target = tmp_path / "demo"
    make(target, {"k": 1}, "old")
    with pytest.raises(IntegrityError, match=r"config\.k: 1 -> 2") as refused:
        make(target, {"k": 2}, on_change="refuse")
    # Of a whole run --force would redo the stages before it, too.
    assert "mmtune demo --force" in refused.value.hint
    assert (target / "data.txt").read_text() == "old"


def test_a_hash_without_a_setting_is_that_of_a_folder_that_never_had_it(tmp_path):
    configs = ({"a": [1]}, {"a": [1], "b": "all"}, {"a": [2], "b": "all"})
    bare, more, other = (make(tmp_path / str(at), config) for at, config in enumerate(configs))
    assert more.hash_without("b") == bare.hash == bare.hash_without("b") != more.hash
    assert other.hash_without("b") != bare.hash


def test_a_failure_leaves_the_old_folder_and_no_rest(tmp_path):
    target = tmp_path / "demo"
    make(target, {"k": 1}, "old")
    with pytest.raises(ZeroDivisionError), storage.open_stage(target, stage="demo", config={"k": 2}) as staging:
        (staging.path / "data.txt").write_text("half")
        raise ZeroDivisionError
    assert (target / "data.txt").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir() if ".tmp-" in p.name] == []


@pytest.mark.parametrize("force", [False, True])
def test_foreign_files_are_never_touched(tmp_path, force):
    target = tmp_path / "demo"
    target.mkdir()
    (target / "thesis.tex").write_text("mine")
    with pytest.raises(RecipeError) as caught:
        make(target, {"k": 1}, force=force)
    assert caught.value.code == "foreign_folder"
    assert (target / "thesis.tex").read_text() == "mine"


def test_damage_is_found(tmp_path):
    target = tmp_path / "demo"
    make(target, {"k": 1}, "abc")
    (target / "data.txt").write_text("abd")
    manifest = storage.read_manifest(target)
    with pytest.raises(IntegrityError, match="recorded bytes") as caught:
        storage.read_manifest(target, verify=True)
    assert caught.value.hint == "run: mmtune demo --force"
    storage.verify_files(target, manifest, part="train")
    (target / "data.txt").write_text("ab")
    with pytest.raises(IntegrityError, match="2 bytes instead of 3"):
        storage.read_manifest(target)
    (target / "data.txt").unlink()
    with pytest.raises(IntegrityError, match="missing"):
        storage.read_manifest(target)


def test_no_byte_of_a_manifest_changes_unnoticed(tmp_path):
    target = tmp_path / "demo"
    made = make(target, {"rate": 1e-4, "name": "Zoë"})
    whole = (target / "manifest.json").read_bytes()
    for place, byte in enumerate(whole):
        for bit in (1, 32):
            flipped = whole[:place] + bytes([byte ^ bit]) + whole[place + 1 :]
            (target / "manifest.json").write_bytes(flipped)
            with pytest.raises(IntegrityError, match=r"demo/manifest\.json") as caught:
                storage.read_manifest(target, made_by="demo")
            assert caught.value.hint == "run: mmtune demo --force"
    (target / "manifest.json").write_bytes(whole)
    assert storage.read_manifest(target) == made


def test_a_manifest_of_the_first_schema_has_no_sha256_of_its_own(tmp_path):
    target = tmp_path / "demo"
    made = make(target, {"k": 1})
    told = json.loads((target / "manifest.json").read_text())
    del told["sha256"]
    (target / "manifest.json").write_text(json.dumps({**told, "schema": 1}))
    assert storage.read_manifest(target) == replace(made, schema=1)
    (target / "manifest.json").write_text(json.dumps(told))
    with pytest.raises(IntegrityError, match="recorded bytes"):
        storage.read_manifest(target)


def test_nothing_is_made_from_a_damaged_parent(tmp_path):
    parent = make(tmp_path / "parent", {"k": 1}, "abc")
    child = {"stage": "child", "config": {}, "parents": {"parent": parent.hash}}
    with storage.open_stage(tmp_path / "child", **child) as staging:
        staging.publish()
    (tmp_path / "parent" / "data.txt").write_text("abd")
    assert storage.open_stage(tmp_path / "child", **child) is None
    with pytest.raises(IntegrityError, match="recorded bytes"):
        storage.open_stage(tmp_path / "child", **child, force=True)
    assert [path.name for path in tmp_path.iterdir() if ".tmp-" in path.name] == []


def test_a_missing_stage_names_the_command(tmp_path):
    with pytest.raises(DataError) as caught:
        storage.read_manifest(tmp_path / "tokens", made_by="tokenize")
    assert caught.value.hint == "run: mmtune tokenize"


def test_two_runs_do_not_write_one_folder(tmp_path):
    with storage.open_stage(tmp_path / "demo", stage="demo", config={}), pytest.raises(LockedError):
        storage.open_stage(tmp_path / "demo", stage="demo", config={})
    assert make(tmp_path / "demo", {}) is not None


def test_a_killed_run_leaves_nothing_under_the_final_name(tmp_path):
    script = (
        "import os, sys; from pathlib import Path; from mmtune import storage\n"
        "s = storage.open_stage(Path(sys.argv[1]) / 'demo', stage='demo', config={})\n"
        "(s.path / 'x').write_text('half'); os._exit(137)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False)
    assert done.returncode == 137
    assert not (tmp_path / "demo").exists()
    make(tmp_path / "demo", {})
    assert [p.name for p in tmp_path.iterdir() if ".tmp-" in p.name] == []


def test_splits_open_with_datasets(tmp_path):
    with storage.open_stage(tmp_path / "demo", stage="demo", config={}) as staging:
        for shard in range(3):
            writer = storage.SplitWriter(staging.path / "train" / f"shard-{shard:05d}.arrow", SCHEMA, rows_per_batch=2)
            for row in range(5):
                writer.write({"id": f"{shard}-{row}", "value": [row] * row})
            assert writer.close() == 5
        assert storage.finish_split(staging.path / "train", SCHEMA) == 15
        assert storage.finish_split(staging.path / "val", SCHEMA) == 0
        staging.publish(rows={"train": 15, "val": 0})
    loaded = datasets.load_from_disk(str(tmp_path / "demo"))
    assert loaded["train"]["id"][7] == "1-2"
    table = storage.open_split(tmp_path / "demo" / "train")
    assert table.num_rows == 15 and table.column("value")[4].as_py() == [4, 4, 4, 4]
    with pytest.raises(DataError, match="train, val"):
        storage.open_split(tmp_path / "demo" / "test")


def test_rejects_are_counted_and_listed(tmp_path):
    with storage.RejectLog(tmp_path / "rejects.jsonl") as log:
        log.write(Reject("f:1", "a", "bad_json", "x"))
        log.write(Reject("f:2", "b\ud800", "bad_json"))
    assert log.counts == {"bad_json": 2}
    assert [json.loads(x)["where"] for x in (tmp_path / "rejects.jsonl").read_text().splitlines()] == ["f:1", "f:2"]


def test_a_disk_that_fills_up_in_a_stage_is_told_with_its_folder(tmp_path):
    staging = storage.open_stage(tmp_path / "demo", stage="demo", config={})
    with pytest.raises(ResourceError, match=r"writing .*/demo: No space left on device"), staging:
        # As Arrow tells of it: no name of a file.
        raise OSError(28, "No space left on device")
    assert [path.name for path in tmp_path.iterdir()] == [".demo.lock"]


def test_a_full_disk_is_a_resource_error():
    with pytest.raises(ResourceError), disk_errors("writing"):
        raise OSError(28, os.strerror(28))


def test_what_changed_is_told_by_its_path_and_from_where_it_parts() -> None:
    def sources(**more: object) -> dict:
        first = {"id": "reviews", "path": "a-long-name/" * 8, "columns": {"text": "t", "options": ["a"], **more}}
        return {"config": {"sources": [first, {"id": "other"}]}}

    assert changes(sources(), sources(options=["a", "b"])) == ['config.sources[0].columns.options: ["a"] -> ["a", "b"]']
    assert changes(sources(), sources(answer="x")) == ['config.sources[0].columns.answer: null -> "x"']
    assert changes({"shots": [1, 2]}, {"shots": [1, 3]}) == ["shots: [1, 2] -> [1, 3]"]
    fewer = {"config": {"sources": sources()["config"]["sources"][:1]}}
    (line,) = changes(fewer, sources())
    before, after = line.removeprefix("config.sources: ").split(" -> ")
    assert before != after and after.endswith('{"id": "other"}]')
    long = "p/" * 60
    assert changes({"path": f"{long}a"}, {"path": f"{long}b"}) == [
        'path: ...p/p/p/p/p/p/p/p/p/p/a" -> ...p/p/p/p/p/p/p/p/p/p/b"'
    ]
