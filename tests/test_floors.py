"""Imports point down only: cli -> stages -> recipe, storage, rooms -> records, errors, files, choice, signals."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "mmtune"
ROOMS = {
    "readers": set(),
    "prompts": {"media"},
    "media": set(),
    "features": {"media"},
    "encoding": {"media", "features", "models"},
    "models": set(),
    "training": {"models", "encoding", "features", "media"},
    "evaluation": {"encoding", "models", "media"},
    "reports": {"media"},
}
GROUND: dict[str, set[str]] = {
    "records": set(),
    "errors": set(),
    "files": {"errors"},
    "choice": set(),
    "signals": set(),
    "hub": set(),
}
MIDDLE = {"recipe", "storage", "talk", "workers"}


def imports(file: Path) -> set[str]:
    """Top-level mmtune modules that a file imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "mmtune":
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("mmtune.")}
    return found - {"__version__"}


def room_of(file: Path) -> str:
    relative = file.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def allowed(room: str, file: Path) -> set[str]:
    if room in ROOMS:
        return ROOMS[room] | set(GROUND) | {room}
    if room == "stages":
        return set(ROOMS) | set(GROUND) | MIDDLE | {"stages"}
    if room in GROUND or room == "__init__":
        return GROUND.get(room, set())
    if room in MIDDLE:
        return set(GROUND) | MIDDLE
    return {"stages", "cli", "order", *MIDDLE, *GROUND}


def test_imports_point_down():
    wrong = []
    for file in sorted(PACKAGE.rglob("*.py")):
        room = room_of(file)
        extra = imports(file) - allowed(room, file)
        wrong += [f"{file.relative_to(PACKAGE)} imports {name}" for name in sorted(extra)]
    assert not wrong, wrong


def test_stages_do_not_import_each_other():
    for file in (PACKAGE / "stages").rglob("*.py"):
        own = ".".join(("mmtune", *file.relative_to(PACKAGE).parts[:2])).removesuffix(".py")
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mmtune.stages"):
                assert node.module.startswith(f"{own}."), (file, node.module)


def test_values_import_no_heavy_library():
    names = [PACKAGE / f"{name}.py" for name in ("records", "errors", "files", "choice", "signals", "talk")]
    for file in (*names, *(PACKAGE / "recipe").glob("*.py"), *(PACKAGE / "cli").glob("*.py")):
        tree = ast.parse(file.read_text())
        for node in tree.body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            heavy = {"torch", "transformers", "datasets", "peft", "accelerate", "PIL", "pyarrow", "numpy"}
            assert not heavy & {n.split(".")[0] for n in names}, (file, names)
