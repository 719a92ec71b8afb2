"""The shipped recipes, the commands and recipes of README and guides, and the wheel that carries them."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
import yaml

from mmtune.cli import app
from mmtune.order import run_stages, stages_of
from mmtune.recipe.elsewhere import ELSEWHERE
from mmtune.recipe.text import load_recipe
from mmtune.stages.init import copy_recipe, list_recipes
from mmtune.stages.keys import list_keys
from mmtune.talk import Talk

ROOT = Path(__file__).resolve().parent.parent
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
README = (ROOT / "README.md").read_text("utf-8")
GUIDES = [ROOT / "README.md", *sorted((ROOT / "recipes").glob("*.md"))]
WORDS = "\n".join(path.read_text("utf-8") for path in GUIDES)
COMMANDS = typer.main.get_command(app)
# A figure with its unit, or a plain word on why there is none.
TIME = r"# time\b[^:]*: (.*\d[a-z ]* (s|min|minutes|hours)\b|not yet measured|depends on your data)"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", WORDS, re.DOTALL)


def assert_parses(line: str) -> None:
    """Parses a command line as the tool would, without running it; named recipes must be there."""
    words = shlex.split(line, comments=True)
    if words[0] == "make":
        targets = (ROOT / "Makefile").read_text("utf-8")
        assert all(re.search(rf"^{word}:", targets, re.MULTILINE) for word in words[1:]), line
    elif words[0] == "mmtune":
        command = COMMANDS.commands[words[1]]  # type: ignore[attr-defined]
        command.make_context(words[1], words[2:])
        named = [word for word in words[2:] if word.startswith("recipes/")]
        assert all((ROOT / word).is_file() for word in named), line


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_loads_and_its_header_says_what_it_takes(path: Path):
    assert load_recipe(path, environ={}).sources
    header = [line for line in path.read_text("utf-8").splitlines() if line.startswith("#")]
    for said, form in (("command", r"# command: \S"), ("hardware", r"# hardware: \S"), ("time", TIME)):
        assert any(re.match(form, line) for line in header), f"{path.name} has no `# {said}:`"
    assert not re.search("TODO|TBD|FIXME", "\n".join(header)), path.name
    command = " ".join(line.partition(":")[2] for line in header if line.startswith("# command:"))
    commands = re.findall(r"(?:mmtune|make) [^\s,()]+(?: [^\s,()]+)*", command)
    assert commands
    for part in commands:
        if not part.endswith(f" {path.name}"):
            assert_parses(part)


def test_a_time_is_a_figure_or_says_why_there_is_none():
    for said in ("TODO", "soon", "12", "minutes", "3 steps", "measured"):
        assert not re.match(TIME, f"# time: {said}"), said
    for said in ("64 s for all", "4 and a half minutes", "training 36 minutes", "not yet measured"):
        assert re.match(TIME, f"# time and score: {said}"), said


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_copy_of_a_recipe_finds_the_bundled_data(path: Path, tmp_path: Path):
    here, copy = load_recipe(path, environ={}), load_recipe(copy_recipe(path.stem, tmp_path), environ={})
    about = {item["name"]: item["about"] for item in list_recipes()}[path.stem]
    # `mmtune init` shows it beside the name, on a line or two.
    assert (
        about.endswith(".")
        and "command:" not in about
        and len(about) <= 150
        and f"# {about[:60]}" in path.read_text("utf-8")
    )
    assert copy.run_dir == tmp_path / here.run_dir.relative_to(ROOT)
    bundled = str(ROOT / "data")
    for mine, theirs in zip(here.sources, copy.sources, strict=True):
        for key in ("path", "questions", "annotations", "images"):
            value = getattr(mine, key)
            if value is not None and value.startswith(bundled):
                assert getattr(theirs, key) == value
    assert here.model is not None and copy.model is not None
    if here.model.path.startswith(bundled):
        assert copy.model.path == here.model.path


@pytest.mark.parametrize("text", blocks("yaml"))
def test_recipes_of_the_guides_load(text: str, tmp_path: Path):
    path = tmp_path / "recipe.yaml"
    path.write_text(text, "utf-8")
    assert load_recipe(path, environ={}).sources


@pytest.mark.parametrize("line", [line for block in blocks("bash") for line in block.splitlines() if line.strip()])
def test_commands_of_the_guides_parse(line: str):
    assert_parses(line)


def test_commands_and_recipes_named_in_the_guides_exist():
    named = set(re.findall(r"`mmtune ([a-z-]+)", WORDS))
    assert named and named <= set(COMMANDS.commands)  # type: ignore[attr-defined]
    files = set(re.findall(r"`(?:python )?((?:recipes|tests|data)/[\w/.-]+\.[a-z]+)", WORDS))
    assert files and not [name for name in files if not (ROOT / name).is_file()]


def anchors(path: Path) -> set[str]:
    """Returns the names by which a page's headings are linked to."""
    heads = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", path.read_text("utf-8"), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", head).lower().replace(" ", "-") for head in heads}


@pytest.mark.parametrize("path", GUIDES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_of_the_guides_lead_somewhere(path: Path):
    links = re.findall(r"\]\(([^)\s]+)\)", path.read_text("utf-8"))
    for link in links:
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.exists() and target.is_relative_to(ROOT), link
        assert not anchor or anchor in anchors(target), link


def test_readme_is_short_and_leads_to_every_guide_and_every_recipe_is_listed():
    assert len(README.splitlines()) <= 270
    linked = {link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", README)}
    assert {str(path.relative_to(ROOT)) for path in GUIDES[1:]} <= linked
    index = (ROOT / "recipes" / "README.md").read_text("utf-8")
    assert set(re.findall(r"\]\((\w+\.yaml)\)", index)) == {path.name for path in RECIPES}


def table_under(heading: str) -> list[list[list[str]]]:
    """Returns the quoted names in every cell of the README's table whose head begins so, by row and column."""
    lines = README[README.index(f"| {heading} |") :].split("\n\n")[0].splitlines()[2:]
    return [[re.findall(r"`([^`]+)`", cell) for cell in line.split("|")[1:-1]] for line in lines]


def test_keys_of_other_trainers_are_told_as_the_readme_has_them():
    rows = table_under("LLaMA-Factory")
    assert len(rows) > 10
    for *theirs, ours in rows:
        for name in {name for cell in theirs for name in cell} - {"model"}:
            assert any(ELSEWHERE.get(name) == key or key.rpartition(".")[2] == name for key in ours), name


def given_keys(value: object, path: str = "") -> Iterator[str]:
    """Every key of a recipe as it stands in the reference, without the brackets of lists."""
    for item in value if isinstance(value, list) else [value]:
        for name, below in item.items() if isinstance(item, dict) else ():
            yield f"{path}{name}"
            yield from given_keys(below, f"{path}{name}.")


def test_every_key_is_shown_somewhere_and_set_by_a_test():
    shown = [*(path.read_text("utf-8") for path in RECIPES), *blocks("yaml")]
    given = {key for text in shown for key in given_keys(yaml.load(text, yaml.BaseLoader))}
    said = " ".join(re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", WORDS, flags=re.DOTALL)))
    mine = Path(__file__).parent
    tests = "\n".join(path.read_text("utf-8") for path in mine.rglob("test_*.py") if path != Path(__file__))
    names = {key.path.replace("[]", ""): key.path.rpartition(".")[2] for key in list_keys()}
    hidden = [path for path, name in names.items() if path not in given and not re.search(rf"\b{name}\b", said)]
    assert not hidden, f"in no recipe and no guide: {hidden}"
    untested = [path for path, name in names.items() if not re.search(rf"\b{name}[\"']?\s*[:=]", tests)]
    assert not untested, f"set by no test: {untested}"


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this tree, unpacked into a folder without a checkout around it."""
    source = tmp_path_factory.mktemp("source")
    for name in ("mmtune", "recipes", "data"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    build = "from setuptools import build_meta; build_meta.build_wheel('dist')"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True, timeout=300)
    (wheel,) = (source / "dist").glob("*.whl")
    folder = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def test_an_installed_wheel_runs_a_recipe_without_a_checkout(unpacked: Path, tmp_path: Path):
    def mmtune(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "mmtune", *arguments],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(unpacked)},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert [line.split()[0] for line in mmtune("init").splitlines()] == [path.stem for path in RECIPES]
    mmtune("init", "quickstart")
    copy = load_recipe(tmp_path / "quickstart.yaml", environ={})
    assert copy.model is not None and copy.model.path == str(unpacked / "mmtune" / "shipped" / "data" / "base")
    assert all(str(source.images).startswith(str(unpacked)) for source in copy.sources)
    mmtune("build-data", "quickstart.yaml", "--limit", "5")
    mmtune("tokenize", "quickstart.yaml")
    assert (tmp_path / "runs" / "quickstart" / "tokens" / "manifest.json").is_file()


@pytest.mark.slow
def test_the_quickstart_runs_on_the_omni_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As the README says it, cut short: from official files to a report of the tuned omni base."""
    monkeypatch.chdir(ROOT)
    short = ["finetune.max_steps=2", "finetune.batch_rows=8", "eval.limit=8", "eval.bootstrap=100", "seed=1"]
    settings = ["model.path=data/omni", f"run_dir={tmp_path / 'run'}", *short]
    recipe = load_recipe(ROOT / "recipes" / "quickstart.yaml", settings, environ={})
    assert recipe.model is not None and recipe.model.path == str(ROOT / "data" / "omni")
    console = Talk(quiet=True)
    results = run_stages(recipe, stages_of(recipe, 24, True), force=False, dry_run=False, console=console)
    assert list(results) == ["build-data", "tokenize", "finetune", "eval", "export"] and results["eval"]["rows"] == 8
    assert results["export"]["rows"] == 48 and results["export"]["difference"] < 1e-4
    models = results["eval"]["metrics"]["vqa_accuracy"]["models"]
    # It knows the old tasks; the comparison is new to it.
    assert set(models) == {"base", "tuned"} and models["base"]["value"] > 20
