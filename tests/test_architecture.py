"""What the code may import, call and hold, checked on its syntax tree and in a fresh interpreter."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from sftmix.cli.commands import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "sftmix"

LEVELS = (
    {"types"},
    {"words"},
    {"disk"},
    {"options", "functional", "ranks"},
    {"components", "model"},
    {"text", "batches", "config"},
    {"data", "training"},
    {"measure"},
    {"pipeline"},
    {"cli", "testing"},
    {"tools"},
    {"__main__"},
)
"""The rooms of the package. A module imports from its own room or from levels before it: types and what a function
imports when it runs are counted, too. A new room is given a level here, and a sentence in docs/architecture.md."""

ENGINE = ("types", "functional", "batches", "training", "model", "ranks")
PACKAGES = {
    "engine": 41_600,
    "text": 12_340,
    "run": 44_150,
    "methods": 7_700,
    "testing": 3_610,
    "tools": 36_200,
}
"""Most nodes of the syntax tree in each package: `package_of` says which rooms it has. Lines and notation win nothing
there, and Python 3.11 to 3.13 count alike (3.12.1 finds one node more, an empty string in an f-string)."""
CLOSURES = {
    "sftmix.functional": 5_710,
    "sftmix.batches.collate": 11_040,
    "sftmix.training.loop": 43_550,
    "sftmix.text": 15_950,
}
"""Most nodes of a module together with all that it imports, in functions as well, but not for types alone.

The reason for each limit of both tables is in docs/decisions/0023-limits-by-package.md. A commit that raises a limit
does nothing else, and says there what the nodes are for."""
MOST_ARROWS = 104
"""Most pairs of rooms of which one imports the other."""

MAX_FLOORS = {"text": 5, "data": 5}
_BELOW = {
    "words": ("errors", "fields", "given", "progress"),
    "disk": ("appended", "files", "places", "tables"),
    "ranks": ("rng", "transfer"),
}
_OF_COMPONENTS = (
    "base",
    "component",
    "confidence",
    "labels",
    "objectives",
    "optimizers",
    "pairing",
    "plans",
    "row_format",
    "shared_scores",
    "view",
)
COMPONENTS_MAY_IMPORT = {
    f"sftmix.{name}"
    for name in ("types", "types.impossible", "functional", "functional.adamw", "functional.fused", "components")
} | {"numpy"}
COMPONENTS_MAY_IMPORT |= {f"sftmix.options.{name}" for name in ("reference", "training")}
COMPONENTS_MAY_IMPORT |= {f"sftmix.{room}.{name}" for room, names in _BELOW.items() for name in names}
COMPONENTS_MAY_IMPORT |= {f"sftmix.components.{name}" for name in _OF_COMPONENTS}
IN_METHODS = {"torch", "bitsandbytes", "pandas", "scipy", "huggingface_hub"}
"""What component modules import where it is used, and nowhere else."""
MAX_LINES = 400

TABLE_OF_COMMANDS = PACKAGE / "cli" / "commands.py"
SOURCES = sorted(PACKAGE.rglob("*.py"))
COMPONENT_FILES = [p for p in SOURCES if PACKAGE / "components" in p.parents and p.name != "__init__.py"]
PYTHON_FILES = [ROOT / "cli.py", *SOURCES, *sorted((ROOT / "tests").rglob("*.py"))]
PYTHON_FILES += sorted((ROOT / "benchmarks").rglob("*.py"))
TEXT_FILES = [*PYTHON_FILES, *PACKAGE.rglob("*.yaml"), *ROOT.glob("*.md"), *ROOT.glob("*.toml"), *ROOT.glob("*.txt")]
TEXT_FILES += [
    p
    for folder in ("docs", "benchmarks", ".ci")
    for p in (ROOT / folder).rglob("*")
    if p.is_file() and p.suffix != ".pyc"
]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imported(nodes: Iterator[ast.AST], path: Path) -> Iterator[str]:
    """Dotted names of what the nodes import; `from package import module` gives package.module.

    A name that `import_module` is given as a string counts, too.
    """
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from (part.value for part in node.args[:1] if isinstance(part, ast.Constant))
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}:{node.lineno}: relative import"
            for alias in node.names:
                module = ROOT.joinpath(*f"{node.module}.{alias.name}".split("."))
                is_module = module.is_dir() or module.with_suffix(".py").is_file()
                yield f"{node.module}.{alias.name}" if is_module else str(node.module)


def running(tree: ast.AST, *, skip: tuple[type[ast.AST], ...] = ()) -> Iterator[ast.AST]:
    """All nodes that can run: not what stands under TYPE_CHECKING, nor what the skipped kinds hold."""
    for node in ast.iter_child_nodes(tree):
        typing_only = isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        if not typing_only and not isinstance(node, skip):
            yield node
            yield from running(node, skip=skip)


def at_import_time(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes that run when the module is imported."""
    return running(tree, skip=(ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))


def part_of(module: str) -> str:
    """sftmix.data.sides -> data."""
    return module.split(".")[1] if "." in module else "__init__"


def level_of(part: str) -> int:
    found = [level for level, parts in enumerate(LEVELS) if part in parts]
    assert found, f"sftmix.{part} has no level: add it to LEVELS in {name_of(Path(__file__))}"
    return found[0]


def module_of(path: Path) -> str:
    dotted = path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
    return dotted.removesuffix(".__init__")


def ours(path: Path) -> set[str]:
    """Modules of the package that a file imports, whenever and for whatever; those of commands are in their table."""
    tools = {command.module for command in COMMANDS.values()} if path == TABLE_OF_COMMANDS else set()
    return tools | {name for name in imported(ast.walk(tree_of(path)), path) if name.startswith("sftmix.")}


def test_imports_go_down():
    """Two rooms of one level do not know each other; the table of commands alone names modules above it."""
    wrong = []
    for path in SOURCES:
        own = part_of(module_of(path))
        others = [] if path == PACKAGE / "__init__.py" else [name for name in ours(path) if part_of(name) != own]
        if path == TABLE_OF_COMMANDS:
            others = [name for name in others if part_of(name) != "tools"]
        wrong += [f"{name_of(path)} imports {n}" for n in others if level_of(part_of(n)) >= level_of(own)]
    assert wrong == []


def test_no_module_imports_itself_by_way_of_others():
    """Inside a room, too."""
    graph = {module_of(path): ours(path) - {module_of(path)} for path in SOURCES if path != PACKAGE / "__init__.py"}
    TopologicalSorter(graph).prepare()  # raises CycleError


@pytest.mark.parametrize("room", MAX_FLOORS)
def test_the_rooms_that_read_text_are_low(room):
    """A floor is a module, or several, above those that they import; the room itself is the highest."""
    graph = {module_of(path): ours(path) for path in SOURCES if path.parent == PACKAGE / room}

    @cache
    def floor(module: str) -> int:
        return 1 + max((floor(below) for below in graph[module] & graph.keys() - {module}), default=0)

    assert max(map(floor, graph)) <= MAX_FLOORS[room]


def test_every_room_has_a_level_and_few_modules_stand_alone():
    parts = [path for path in PACKAGE.iterdir() if (path / "__init__.py").exists() or path.suffix == ".py"]
    assert {path.stem for path in parts} - {"__init__"} == set().union(*LEVELS)
    assert sum(len(level) for level in LEVELS) == len(set().union(*LEVELS))
    entries = {"__init__", "__main__"}  # their place and name are Python's
    assert len([path for path in parts if path.suffix == ".py" and path.stem not in entries]) <= 2


def test_the_picture_of_the_rooms_has_the_levels():
    """Names at one height are a level, and the records are at the bottom."""
    rows: dict[int, set[str | None]] = {}
    for text in ET.parse(ROOT / "docs" / "images" / "rooms.svg").iter("{http://www.w3.org/2000/svg}text"):
        rows.setdefault(-int(text.attrib["y"]), set()).add(text.text)
    assert tuple(rows[height] for height in sorted(rows)) == LEVELS


def test_components_import_little_and_what_is_heavy_only_in_functions():
    wrong = []
    for path in COMPONENT_FILES:
        tree = tree_of(path)
        light = COMPONENTS_MAY_IMPORT | sys.stdlib_module_names
        names = [name for name in imported(ast.walk(tree), path) if name not in light]
        names = [name for name in names if name.partition(".")[0] not in light | IN_METHODS]
        names += [name for name in imported(at_import_time(tree), path) if name.partition(".")[0] in IN_METHODS]
        wrong += [f"{name_of(path)} imports {name}" for name in names]
    assert wrong == []


def test_the_checks_for_writers_of_components_are_apart():
    """A run does not need them; the command that lists components imports them when it is asked to check one."""
    users = {name_of(path) for path in SOURCES if "testing" in map(part_of, ours(path))}
    assert {name for name in users if not name.startswith("sftmix/testing/")} == {"sftmix/tools/listing/command.py"}
    command = PACKAGE / "tools" / "listing" / "command.py"
    assert "sftmix.testing" not in set(imported(at_import_time(tree_of(command)), command))


def test_a_run_needs_two_of_the_methods():
    """Those of its default callbacks. Tools may take others."""
    rooms = [path for path in SOURCES if not {"components", "tools"} & {*path.relative_to(PACKAGE).parts}]
    needed = {name for path in rooms for name in ours(path) if name.startswith("sftmix.components.others")}
    assert needed == {f"sftmix.components.others.{name}" for name in ("calibration", "remarks")}


def test_the_mathematics_need_torch_alone():
    for path in (PACKAGE / "functional").glob("*.py"):
        modules = {
            name for name in imported(ast.walk(tree_of(path)), path) if not name.startswith("sftmix.functional.")
        }
        more = {"torch", "triton"} if path.name == "kernels.py" else {"torch"}  # which GPUs import, where it is there
        assert {module.partition(".")[0] for module in modules} <= sys.stdlib_module_names | more, path


def test_text_needs_neither_torch_nor_what_stores_rows():
    """Not in functions either."""
    for path in (PACKAGE / "text").glob("*.py"):
        packages = {name.partition(".")[0] for name in imported(running(tree_of(path)), path)}
        assert packages.isdisjoint({"torch", "datasets", "pyarrow"}), path


def test_files_are_short():
    lines = {name_of(path): len(path.read_text(encoding="utf-8").splitlines()) for path in PYTHON_FILES}
    assert {name: count for name, count in lines.items() if count > MAX_LINES} == {}


def is_text(statement: ast.stmt) -> bool:
    value = statement.value if isinstance(statement, ast.Expr) else None
    return isinstance(value, ast.Constant) and isinstance(value.value, str)


def count_nodes(path: Path) -> int:
    """Nodes of a file's syntax tree without operators, contexts, and the strings that document something."""
    light = (ast.expr_context, ast.operator, ast.boolop, ast.unaryop, ast.cmpop)
    nodes = list(ast.walk(tree_of(path)))
    bodies = [node.body for node in nodes if isinstance(getattr(node, "body", None), list)]
    documents = sum(is_text(statement) for body in bodies for statement in body)
    return sum(not isinstance(node, light) for node in nodes) - 2 * documents  # a statement and the constant in it


def package_of(path: Path) -> str:
    """Return the package of a file of sftmix/: methods are the folders below components, run all that is not named."""
    rooms = path.relative_to(PACKAGE).parts[:-1]
    if not rooms:
        return "run"
    if rooms[0] == "components" and len(rooms) > 1:
        return "methods"
    return "engine" if rooms[0] in ENGINE else rooms[0] if rooms[0] in PACKAGES else "run"


def closure(module: str) -> int:
    """Return the nodes of a module and of all modules of ours that it imports, with the packages that hold them."""
    files = {module_of(path): path for path in SOURCES}
    seen, rest = set[str](), [module]
    for name in rest:
        if name not in seen and name.startswith("sftmix"):
            seen.add(name)
            rest.append(name.rpartition(".")[0])
            rest += imported(running(tree_of(files[name])), files[name])
    return sum(count_nodes(files[name]) for name in seen)


def test_no_package_grows_without_a_word():
    found = Counter[str]()
    for path in SOURCES:
        found[package_of(path)] += count_nodes(path)
    assert found.keys() == PACKAGES.keys()
    assert {name: count for name, count in found.items() if count > PACKAGES[name]} == {}


@pytest.mark.parametrize("module", CLOSURES)
def test_a_part_drags_little_along(module):
    assert closure(module) <= CLOSURES[module]


def test_modules_import_options_from_their_files():
    """The face imports a file when a class is asked for, so a closure would not show it."""
    wrong = [name_of(path) for path in SOURCES if "sftmix.options" in ours(path)]
    assert wrong == []


def test_the_face_of_options_loads_no_more_than_a_class_needs():
    check = (
        "import sys, sftmix.options as o; o.TrainingOptions; print('sftmix.options.data' in sys.modules); "
        "print(all(isinstance(getattr(o, name), type) for name in o.__all__), hasattr(o, 'Nothing'))"
    )
    done = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True", "False"]


def test_rooms_have_few_arrows():
    own = {path: part_of(module_of(path)) for path in SOURCES}
    pairs = {(own[path], part_of(name)) for path in SOURCES for name in ours(path)}
    assert sum(one != other for one, other in pairs) <= MOST_ARROWS


def foreign_code(path: Path) -> Iterator[str]:
    """Yield `file:line` of what could turn data into code."""
    tree = tree_of(path)
    packages = {module.partition(".")[0] for module in imported(ast.walk(tree), path)}
    if packages & {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}:
        yield name_of(path)
    for node in ast.walk(tree):
        runs = isinstance(node, ast.Attribute) and ast.unparse(node) in {"torch.load", "torch.save"}
        runs |= isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in {"eval", "exec"}
        runs |= isinstance(node, ast.keyword) and node.arg == "trust_remote_code" and ast.unparse(node.value) != "False"
        if runs:
            yield f"{name_of(path)}:{node.lineno}"


def test_nothing_runs_foreign_code():
    """No pickle, torch.load, torch.save, eval, exec or trust_remote_code=True: data must never become code."""
    assert [found for path in (ROOT / "cli.py", *SOURCES) for found in foreign_code(path)] == []


def test_no_path_of_one_machine():
    words = re.compile(r"(?<![\w.])/(work|home|root|Users)/")
    texts = {path: path.read_text(encoding="utf-8", errors="replace") for path in TEXT_FILES}
    assert [name_of(path) for path, text in texts.items() if words.search(text)] == []


@pytest.mark.parametrize(
    "statement",
    [
        "import sftmix",
        "import sftmix.components as c; [getattr(c, name) for name in c.__all__]; assert c.catalogue()",
        "import sftmix.tools.quickstart",
        "import sftmix.disk.tables",
        "import sftmix.text",
    ],
)
def test_importing_is_light(statement):
    heavy = "{'torch', 'transformers', 'datasets', 'pyarrow', 'peft', 'pandas'}"
    check = f"import sys; {statement}; print(*sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
