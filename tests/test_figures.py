"""What a reader feels: long and branched bodies, large files, unlike assignments, types, names in two rooms.

What is longer today is listed; a list only shrinks: an entry whose function is short again is taken out.
"""

import ast
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "sftmix"
SOURCES = sorted(PACKAGE.rglob("*.py"))
MOST_LINES, MOST_BRANCHES, MOST_VALUES, LARGE = 40, 16, 3, 340
BRANCHES = (ast.If, ast.IfExp, ast.For, ast.While, ast.Try, ast.ExceptHandler)
BRANCHES += (ast.comprehension, ast.BoolOp, ast.With, ast.match_case)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)

BRANCHED = set[str]()
LARGE_FILES = {"functional/fused.py", "training/step.py"}
KERNELS = "functional/kernels.py"
"""Triton's functions: a type in their signatures is an instruction to the compiler, and variables come in pairs."""
TWICE = {
    "Perplexity": "the confidence of a run, and the signal of wrong rows",
    "PairSampler": "ours, and torch's kind for other trainers",
    "Options": "each tool has its own, for the command line",
}
"""Public names in two rooms, and why."""


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def functions() -> Iterator[tuple[str, list[ast.stmt], ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Yield the name of each function with its file, its body without the docstring, and itself."""
    for path in SOURCES:
        for node in ast.walk(tree_of(path)):
            if isinstance(node, FUNCTIONS):
                body = node.body[ast.get_docstring(node) is not None :]
                yield f"{name_of(path)}:{node.name}", body, node


def test_a_function_fits_a_screen():
    lines = {name: body[-1].end_lineno - body[0].lineno + 1 for name, body, _ in functions() if body}
    assert {name for name, count in lines.items() if count > MOST_LINES} == set()


def test_a_function_has_few_branches():
    found = set()
    for name, body, _ in functions():
        if sum(isinstance(node, BRANCHES) for statement in body for node in ast.walk(statement)) > MOST_BRANCHES:
            found.add(name)
    assert found == BRANCHED


def test_few_files_are_large():
    lines = {name_of(path): len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCES}
    assert {name for name, count in lines.items() if count >= LARGE} == LARGE_FILES


def test_one_value_a_line():
    """Two or three values of one kind may share a line: not more, and never literals beside calls."""
    found = []
    for path in SOURCES:
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple):
                values = node.value.elts if isinstance(node.value, ast.Tuple) else []
                calls = [any(isinstance(part, ast.Call) for part in ast.walk(value)) for value in values]
                literal = [isinstance(value, (ast.Constant, ast.List, ast.Dict, ast.Set)) for value in values]
                beside = any(calls) and any(it and not call for it, call in zip(literal, calls, strict=True))
                if (len(values) > MOST_VALUES or beside) and name_of(path) != KERNELS:
                    found.append(f"{name_of(path)}:{node.lineno}")
    assert found == []


def test_parameters_have_types():
    found = []
    for path in SOURCES:
        for node in tree_of(path).body:
            if isinstance(node, FUNCTIONS) and name_of(path) != KERNELS:
                parameters = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                found += [f"{name_of(path)}:{node.name} {one.arg}" for one in parameters if one.annotation is None]
    assert found == []


def test_a_public_name_is_there_once():
    rooms = defaultdict(set)
    for path in SOURCES:
        parts = path.relative_to(PACKAGE).parts
        for node in tree_of(path).body:
            if isinstance(node, (*FUNCTIONS, ast.ClassDef)) and not node.name.startswith("_") and node.name != "main":
                rooms[node.name].add("/".join(parts[: 2 if parts[0] == "tools" else 1]))
    assert {name for name, where in rooms.items() if len(where) > 1} == set(TWICE)
