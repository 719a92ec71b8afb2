"""Fixtures for all tests: no network, and real data where it is at hand."""

import os
import signal
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# How long an example takes says what else the machine does.
settings.register_profile("mmtune", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("mmtune")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# The oracles are made on a CPU. A GPU is shown to the tests, and to their *_on_gpu files, only when asked for.
if not os.environ.get("MMTUNE_TEST_GPU"):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
for name in [name for name in os.environ if name.startswith("MMTUNE_") and not name.startswith("MMTUNE_TEST_")]:
    del os.environ[name]

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def repository() -> Path:
    return REPOSITORY


@pytest.fixture(scope="session")
def shared_datasets() -> Path:
    """The folder of real datasets; tests that need it skip where it is absent."""
    folder = Path(os.environ.get("MMTUNE_TEST_DATASETS", REPOSITORY.parent / "shared" / "datasets"))
    if not (folder / "INDEX.md").is_file():
        pytest.skip(f"the real datasets are not at {folder} (set MMTUNE_TEST_DATASETS)")
    return folder


@pytest.fixture(scope="session")
def tiny_vlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder in the shape of the bundled base, with random weights."""
    import importlib.util

    import torch
    from transformers import LlavaForConditionalGeneration

    spec = importlib.util.spec_from_file_location("make_base", REPOSITORY / "data" / "make_base.py")
    assert spec is not None and spec.loader is not None
    maker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(maker)
    folder = tmp_path_factory.mktemp("tiny") / "model"
    tokenizer = maker.make_tokenizer()
    maker.make_processor(tokenizer).save_pretrained(folder)
    torch.manual_seed(0)
    LlavaForConditionalGeneration(maker.make_config(tokenizer)).save_pretrained(folder)
    return folder


def pytest_configure() -> None:
    """Hears signals as a terminal's process does: whoever runs the tests in the background has some of them ignored."""
    usual = {signal.SIGTERM: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    for number, handler in usual.items():
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)
