"""The command line: every command parses, calls one stage and prints. Stages are imported inside their commands."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable
from typing import Annotated

import typer

from mmtune import __version__
from mmtune.cli.datasets import build_data, extract, tokenize
from mmtune.cli.exporting import export
from mmtune.cli.looking import doctor, init, keys, show
from mmtune.cli.options import keeping_stdout
from mmtune.cli.prompting import prompt
from mmtune.cli.scoring import evaluate, score
from mmtune.cli.training import finetune, pretrain
from mmtune.cli.whole import run
from mmtune.errors import RecipeError

EPILOG = (
    "Exit codes: 0 ok, 1 bug, 2 recipe or usage, 3 bad data, 4 missing capability, 5 resources, 6 diverged, "
    "7 integrity, 8 locked by another run, 9 a gate not met, 75 interrupted and resumable, 130 SIGINT, 141 broken pipe."
)

app = typer.Typer(
    name="mmtune",
    help="Raw multimodal data to an instruction-tuned model and an honest before/after report.",
    epilog=EPILOG,
    invoke_without_command=True,
    add_completion=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="rich" if sys.stdout.isatty() and not os.environ.get("NO_COLOR") else None,
    pretty_exceptions_enable=False,
)

STAGES: dict[str, Callable[..., None]] = {
    "build-data": build_data,
    "extract": extract,
    "prompt": prompt,
    "tokenize": tokenize,
    "pretrain": pretrain,
    "finetune": finetune,
    "eval": evaluate,
    "export": export,
    "run": run,
}
"""Commands that run stages, and with them libraries that may print."""
COMMANDS: dict[str, Callable[..., None]] = {
    **{name: keeping_stdout(command) for name, command in STAGES.items()},
    "score": score,
    "init": init,
    "show": show,
    "doctor": doctor,
    "keys": keys,
}
SECOND_NAMES = {"build-instructions": COMMANDS["build-data"], "evaluate": COMMANDS["eval"]}
"""Other names of a command, left out of the help."""

for _name, _command in COMMANDS.items():
    app.command(_name, epilog=EPILOG)(_command)
for _name, _command in SECOND_NAMES.items():
    app.command(_name, hidden=True)(_command)


def _version(value: bool) -> None:
    if value:
        print(f"mmtune {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help(), file=sys.stderr)
        raise typer.Exit(RecipeError.exit_code)
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # Deprecations inside the libraries are for their callers, not for the person at the command line.
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    # PEFT loads it wherever it is installed, and on some processors it tells at once what would make it faster.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # It names every part of a model that it leaves alone, and every backend that is not installed.
    logging.getLogger("liger_kernel").setLevel(logging.ERROR)
