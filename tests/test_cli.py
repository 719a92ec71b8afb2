"""What every command does before its stage: the network switch."""

import json
import os

import pytest

from mmtune import cli
from mmtune.stages import build_data, evaluate, finetune, tokenize

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
        cli.main()
    assert end.value.code == 0
    switch = "1" if given else "0"
    expected = {name: (None if name == "build-data" else given, switch) for name in STAGES}
    assert seen == (expected if command == "run" else {command: expected[command]})
