"""The modules of the package import only what lies below them, and stay short."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "mlx_flash"
# From the bottom up; modules of one row may import each other, but in no circle.
ROWS = (
    (
        "errors",
        "_version",
        "demo_models",
        "memory_size",
        "arrays",
        "tables",
        "progress",
    ),
    ("storage",),
    ("profile",),
    ("memory",),
    ("traces",),
    ("models", "layers"),
    ("checkpoints",),
    ("assembly",),
    (
        "run",
        "reported",
        "run_report",
        "resident",
        "draft_model",
        "adapters",
        "skipping",
        "chunks",
    ),
    ("flash",),
    ("load_options",),
    ("machines", "sizing", "attach"),
    ("loading",),
    (
        "generation",
        "prompts",
        "stop_texts",
        "thinking",
        "conversation",
        "speculation",
        "drafting",
        "kv_cache",
        "prompt_cache",
    ),
    ("inspection", "same_output", "server", "tracing", "learning"),
    ("planning", "converters"),
    ("library",),
    ("bench",),
    ("cli", "__main__"),
)
RANK = {name: rank for rank, row in enumerate(ROWS) for name in row}
APART = {"planning": "converters", "converters": "planning"}
MOST_LINES = 300


def modules():
    files = sorted(PACKAGE.rglob("*.py")) + sorted(
        (PACKAGE / "converters").glob("**/*.py")
    )
    return sorted({file for file in files if file != PACKAGE / "__init__.py"})


def name_of(file):
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(file):
    """The modules of the package that a file imports, wherever in it."""
    name = name_of(file)
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("mlx_flash."):
                    yield alias.name.removeprefix("mlx_flash.")
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                above = package.split(".") if package else []
                above = above[: len(above) - node.level + 1]
                base = ".".join([*above, *(node.module or "").split(".")]).strip(".")
            elif (node.module or "").startswith("mlx_flash."):
                base = node.module.removeprefix("mlx_flash.")
            else:
                continue
            for alias in node.names:
                full = f"{base}.{alias.name}".strip(".")
                path = PACKAGE / full.replace(".", "/")
                yield (
                    full if path.is_dir() or path.with_suffix(".py").exists() else base
                )


GRAPH = {name_of(file): sorted(set(imports_of(file)) - {""}) for file in modules()}


def top(module):
    return module.split(".")[0]


def test_every_module_has_a_row():
    assert {top(module) for module in GRAPH} <= RANK.keys()


@pytest.mark.parametrize("module", GRAPH)
def test_nothing_imports_what_lies_above_it(module):
    for imported in GRAPH[module]:
        if imported == "_version":
            continue
        assert RANK[top(imported)] <= RANK[top(module)], f"{module} → {imported}"
        assert APART.get(top(module)) != top(imported), f"{module} → {imported}"


def test_there_are_no_circles():
    done, path = set(), []

    def visit(module):
        if module in path:
            pytest.fail(" → ".join([*path[path.index(module) :], module]))
        if module in done or module not in GRAPH:
            return
        path.append(module)
        for imported in GRAPH[module]:
            visit(imported)
        done.add(path.pop())

    for module in GRAPH:
        visit(module)


@pytest.mark.parametrize(
    "file", [*modules(), *sorted(PACKAGE.rglob("*.[ch]"))], ids=str
)
def test_files_hold_one_idea(file):
    assert len(file.read_text().splitlines()) <= MOST_LINES
