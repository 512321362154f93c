"""The rooms of the house and the one direction of their imports."""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "kdlora"
ORDER = [
    {"errors"},
    {"foreign", "extras", "section"},
    {"dataconfig", "defaults", "shipconfig"},
    {"config"},
    {"searchconfig"},
    {"configfile"},
    {"system.integrity", "system.ownership"},
    {"system", "data.tasks", "data.parquet", "data.lines", "data.tags", "data.windows"},
    {"data.logit_table"},
    {"evidence.predictions"},
    {"evidence.records"},
    {"evidence", "distil.losses"},
    {"report", "data"},
    {"models"},
    {"distil"},
    {"deploy"},
    {"asking"},
    {"experiment"},
    {"demo", "doctor"},
    {"terminal"},
    {"cli"},
    {"__main__"},
]
TORCH = {"torch", "transformers", "datasets", "peft", "accelerate"}
WITHOUT_TORCH = [
    *(
        "errors",
        "extras",
        "foreign",
        "section",
        "dataconfig",
        "shipconfig",
        "terminal",
        "defaults",
        "config",
        "searchconfig",
        "configfile",
        "cli",
    ),
    "demo",
    *("data.tasks", "data.tags", "data.windows", "data.logit_table", "distil.words", "evidence", "report", "system"),
]


def modules():
    for file in sorted(SOURCE.rglob("*.py")):
        parts = file.relative_to(SOURCE).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts), file


def level(module):
    """The level of the most specific entry that names the module or a package of it."""
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        for number, names in enumerate(ORDER):
            if ".".join(parts[:length]) in names:
                return number
    raise AssertionError(f"kdlora.{module} has no place in ORDER")


def imports(file, *, top_level_only=False):
    tree = ast.parse(file.read_text(encoding="utf-8"))
    guarded = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    for node in tree.body if top_level_only else ast.walk(tree):
        if id(node) in guarded:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize(("module", "file"), [pytest.param(m, f, id=m) for m, f in modules() if m != "__init__"])
def test_imports_go_one_way(module, file):
    """A room that reaches back makes a circle, and soon nothing can be used alone."""
    own = level(module)
    names = {name for _, f in modules() for name in [_]}
    for imported in imports(file):
        inner = imported.removeprefix("kdlora.")
        if imported.startswith("kdlora.") and inner in names and inner != "__init__":
            assert level(inner) <= own, f"{module} imports {inner}"


@pytest.mark.parametrize(("module", "file"), [pytest.param(m, f, id=m) for m, f in modules()])
def test_light_modules_do_not_load_torch(module, file):
    """`--help`, `validate` and `report` would take seconds if torch came in by the way."""
    if module == "__init__" or any(module == light or module.startswith(light + ".") for light in WITHOUT_TORCH):
        heavy = {name.split(".")[0] for name in imports(file, top_level_only=True)} & TORCH
        assert not heavy, f"kdlora.{module} imports {heavy} at the top"
