"""The house stays in order: imports go down only, files, functions and signatures stay small. docs/architecture.md."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS = (
    "kernels version checkout keywords machine stopping",
    "memory files proofs",
    "values",
    "data",
    "parallel model",
    "objectives",
    "density training",
    "evaluation",
    "measures",
    "run",
    "planning integrations pages",
    "benchmarks",
    "cli",
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms.split()}
STAND_INS = [ROOT / "kunbr_fast" / f"{top}.py" for top in ("kernels", "benchmarks")]  # of the folders beside it
FILES = [f for top in ("kernels", "kunbr_fast", "benchmarks") for f in sorted((ROOT / top).rglob("*.py"))]
MODULES = {
    tuple(part for part in file.relative_to(ROOT).with_suffix("").parts if part not in ("kunbr_fast", "__init__")): file
    for file in FILES
    if file not in STAND_INS
}
FOREIGN = ("cuda", "cuda_library", "triton_kernel", "reference")  # Triton's and C's signatures, and their references'


def imports(name, tree):
    """The project's own modules that a file imports, at its top or late, as tuples of their path's parts."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found = [alias.name.split(".")[1:] for alias in node.names if alias.name.startswith("kunbr_fast")]
        elif isinstance(node, ast.ImportFrom):
            up = len(name) - node.level + (MODULES[name].stem == "__init__")
            package = ("kunbr_fast", *name[:up]) if node.level else ()
            whole = (*package, *(node.module.split(".") if node.module else ()))
            found = [(*whole, alias.name)[1:] for alias in node.names] if whole[0] == "kunbr_fast" else []
        else:
            continue
        for parts in map(tuple, found):
            while parts and parts not in MODULES:
                parts = parts[:-1]
            if parts and parts != name:
                yield parts


TREES = {name: ast.parse(file.read_text()) for name, file in MODULES.items()}
ARROWS = {name: set(imports(name, tree)) for name, tree in TREES.items()}


def test_imports_go_down_only():
    for name, targets in ARROWS.items():
        for other in targets if name and name[0] not in ("__main__",) else ():
            same = name[0] == other[0]
            assert same or FLOOR[other[0]] < FLOOR[name[0]], f"{'.'.join(name)} imports {'.'.join(other)}"


def test_there_is_no_circle():
    done, path = set(), []

    def walk(name):
        assert name not in path, " -> ".join(".".join(n) for n in [*path[path.index(name) :], name])
        if name not in done:
            path.append(name)
            for other in sorted(ARROWS[name]):
                walk(other)
            done.add(path.pop())

    for name in ARROWS:
        walk(name)


def test_kernels_are_usable_alone():
    """They import nothing of the package around them."""
    assert not [
        name for name, targets in ARROWS.items() if name[:1] == ("kernels",) for t in targets if t[0] != "kernels"
    ]


@pytest.mark.parametrize("name", MODULES, ids=".".join)
def test_sizes(name):
    lines = len(MODULES[name].read_text().splitlines())
    assert lines <= 450, f"{lines} lines"
    for node in ast.walk(TREES[name]):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        first = node.body[1] if ast.get_docstring(node) and len(node.body) > 1 else node.body[0]
        length = node.end_lineno - first.lineno + 1
        assert length <= 60, f"{node.name}: {length} lines"
        marks = " ".join(ast.unparse(d) for d in node.decorator_list)
        if any(mark in marks for mark in ("jit", "custom_op", "register_")) or MODULES[name].stem in FOREIGN:
            continue
        arguments = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
        if arguments[:1] == ["ctx"]:
            continue  # autograd's
        arguments = [name for name in arguments if name not in ("self", "cls")]
        assert len(arguments) <= 8, f"{node.name}: {len(arguments)} parameters"
