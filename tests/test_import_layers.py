"""The rooms of the house and the one direction of their imports."""

import ast
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src" / "kdlora"
ORDER = [
    {"errors"},
    {"foreign", "extras", "section"},
    {"defaults"},
    {"config"},
    {"searchconfig"},
    {"configfile"},
    {"system.integrity", "system.ownership"},
    {"system", "data.tasks", "data.parquet", "data.lines", "data.tags", "data.windows"},
    {"data.logit_table"},
    {"evidence.predictions"},
    {"evidence.records"},
    {"evidence"},
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


def imports(file):
    tree = ast.parse(file.read_text(encoding="utf-8"))
    guarded = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in guarded:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_imports_go_one_way():
    """A room that reaches back makes a circle, and soon nothing can be used alone."""
    files = {module: file for module, file in modules() if module != "__init__"}
    back = [
        f"{module} imports {imported}"
        for module, file in files.items()
        for imported in imports(file)
        if imported.removeprefix("kdlora.") in files and level(imported.removeprefix("kdlora.")) > level(module)
        if imported.startswith("kdlora.")
    ]
    assert back == []
