"""The documentation says what is true: links and names exist, commands parse, Python runs, generated pages are current.

What is executed runs in processes of its own, in a directory with a tiny model and rows: a user's module imported here
would stay a known component for the tests that follow.
"""

import argparse
import importlib
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, fields
from itertools import chain
from pathlib import Path

import pytest

from sftmix.cli.commands import COMMANDS
from sftmix.components.listing import catalogue
from sftmix.config.schema import component_bases, import_class, is_list, option_hints, options_of
from sftmix.options import LoraOptions, ReferenceModel, ReferenceTraining
from sftmix.tools.compare import TableOptions
from sftmix.tools.listing.command import NESTED
from sftmix.tools.runs.arguments import add_options
from sftmix.words import errors
from tests.tiny import Tiny, make_tiny

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md")), ROOT / "benchmarks" / "first_gpu_hour.md"]
FOLDERS = (".ci", "benchmarks", "docs", "sftmix", "tests")
"""The folders of the repository; a checkout may hold others, such as runs/."""
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
PROGRAMS = {
    "sftmix",
    "torchrun",
    "python",
    "pip",
    "pytest",
    "ruff",
    "mypy",
    "mkdocs",
    ".ci/run",
    ".ci/versions",
}
PROGRAMS |= {".ci/dist", "git", "cd", "hf", "accelerate", "transformers", "vllm", "llama-server"}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def blocks(page: Path, language: str) -> list[str]:
    return [body for kind, body in FENCE.findall(page.read_text(encoding="utf-8")) if kind == language]


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def inline_code(page: Path) -> list[str]:
    return re.findall(r"(?<!`)`([^`\n]+)`(?!`)", prose(page))


def commands(page: Path) -> list[list[str]]:
    """The words of every command in the bash blocks of a page."""
    found = []
    for block in blocks(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            found += [shlex.split(part) for part in line.split(" && ") if part.strip()]
    return found


def sftmix_words(words: list[str]) -> list[str] | None:
    """What our command line is given, or None for another program."""
    if words[0] == "sftmix":
        return words[1:]
    if " -m sftmix " in f" {shlex.join(words)} ":
        return words[words.index("sftmix") + 1 :]
    return None


# ------------------------------------------------------------------------------------- links and names


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_relative_links_exist(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if link.startswith(("https://", "http://")):
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_every_page_is_reachable():
    linked = {(page.parent / link).resolve() for page in PAGES for link in re.findall(r"\]\(([^)#\s]+)", prose(page))}
    assert not set(PAGES) - linked


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_names_of_code_exist(page):
    for code in inline_code(page):
        if name := re.fullmatch(r"(sftmix(?:\.\w+)+)(\(.*\))?", code):
            assert resolve(name[1]) is not None, code
        if re.fullmatch(r"(\.?[\w-]+/)+[\w.-]*", code) and code.split("/")[0] in FOLDERS:
            assert (ROOT / code).exists(), code


def test_the_page_of_rooms_names_what_is_there():
    """Files of its walks and table, and the functions and classes beside them."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    for line in page.splitlines():
        names = [name for name in re.findall(r"`(\w+/\w+\.py)`", line) if not name.startswith("tests/")]
        files = [ROOT / "sftmix" / name for name in names]
        source = "".join(path.read_text(encoding="utf-8") for path in files)
        if files:
            for name in re.findall(r"`(?:\w+\.)?(\w+)`", line):
                assert re.search(rf"\b{name}\b", source), f"{name} is not in {line}"
    rooms = {path.name for path in (ROOT / "sftmix").iterdir() if (path / "__init__.py").exists()}
    assert rooms <= set(re.findall(r"^  (\w+)/ ", page, re.M))


def resolve(dotted: str) -> object:
    """The module or attribute of a dotted name; None where there is none."""
    parts = dotted.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for name in parts[length:]:
            found = getattr(found, name, None)
        return found
    return None


@pytest.mark.parametrize("page", sorted((ROOT / "docs" / "api").glob("*.md")), ids=name_of)
def test_api_pages_name_what_is_there(page):
    """Directives of mkdocstrings, which fills the page from the docstrings of what they name."""
    names = re.findall(r"^::: (\S+)$", prose(page), re.M)
    assert names or page.name == "index.md"
    assert [name for name in names if resolve(name) is None] == []


def known_options() -> set[str]:
    words = (
        "config print_config rows no_color bad help version gpu gpus bandwidth gpus_per_node mfu tflops variants list"
    )
    own = {
        *words.split(),
        *(f.name for f in fields(TableOptions)),
    }
    parser = argparse.ArgumentParser(conflict_handler="resolve")
    for module in {command.module for command in COMMANDS.values()}:
        if options := getattr(importlib.import_module(module), "Options", None):
            add_options(parser, options)
    own |= {flag.removeprefix("--") for flag in parser._option_string_actions}
    of_launchers = {"nnodes", "nproc_per_node", "max_restarts", "rdzv_backend", "rdzv_endpoint", "rdzv_id"}
    of_launchers |= {"signal", "signals"}
    lists = {f"{key}+" for key, hint in option_hints().items() if is_list(hint)}
    shipped = {component.path: base for base, found in catalogue() for component in found}
    of_base = {base.__name__: option for option, base in (component_bases() | NESTED).items()}
    components = {f"{of_base[b]}.{name}" for path, b in shipped.items() for name in options_of(import_class(path))}
    groups = (("model", ReferenceModel), ("training", ReferenceTraining), ("model.lora", LoraOptions))
    nested = {f"reference.{group}.{f.name}" for group, cls in groups for f in fields(cls)}
    return {*own, *of_launchers, *lists, *option_hints(), *components, *nested}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_options_exist(page):
    ours = [code for code in inline_code(page) if not code.startswith("pip ")]
    named = set(chain.from_iterable(re.findall(r"--([a-z][\w.]*\+?)", code) for code in ours))
    assert not named - known_options()


def test_components_page_lists_all_that_are_shipped():
    text = prose(ROOT / "docs" / "components.md")
    for base, found in catalogue():
        assert all(f"`{name}`" in text for name in (base, *(component.name for component in found)))


def test_configuration_page_is_current():
    written = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    made = runpy.run_path(str(ROOT / "docs" / "make_configuration.py"))["configuration"]()
    assert written == made, "run python docs/make_configuration.py"


def test_every_exit_code_is_documented():
    text = prose(ROOT / "docs" / "run-directory.md")
    kinds = [kind for kind in vars(errors).values() if hasattr(kind, "exit_code") and kind is not errors.SFTMixError]
    assert errors.Stopped in kinds
    assert all(f"| {kind.exit_code} |" in text for kind in kinds)


# -------------------------------------------------------------------------------------------- commands


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_are_of_known_programs(page):
    for words in commands(page):
        assert words[0] in PROGRAMS, words
        ours = sftmix_words(words)
        assert ours is None or ours[0] in COMMANDS, words


DRIVER = """
import json, sys
from importlib import import_module
from sftmix.cli import main

# What the commands call once their words are understood; everything before it is the real thing.
RESULTS = {
    "tools.runs.start.check_start tools.runs.start.check_names_given tools.runs.export.export_run": None,
    "tools.compare.command.run_table tools.answers.chat.chat tools.stages.command.write_run_cards": None,
    "tools.trackers.command.main tools.quickstart.command.main tools.suspects.command.main": None,
    "tools.answers.generate.main tools.evaluate.command.main tools.verify.command.main": None,
    "tools.sharing.command.main": None,
    "pipeline.recipe.run": {},
    "tools.preview.command.preview tools.estimate.run.estimate tools.estimate.command.described": "",
    "tools.runs.models.finished_models tools.runs.read.refuse_no_run tools.report.write.write_report": [],
}
for places, result in RESULTS.items():
    for place in places.split():
        module, _, name = ("sftmix." + place).rpartition(".")
        assert hasattr(import_module(module), name), place
        setattr(import_module(module), name, lambda *args, result=result, **options: result)
json.dump([main(words) for words in json.load(sys.stdin)], open("codes.json", "w"))
"""


@dataclass(frozen=True)
class Workspace:
    """A directory as a reader of the documentation has one: my-model, rows.json, my_*.py, runs/first."""

    path: Path
    tiny: Tiny

    def python(self, *words: str, given: str | None = None) -> subprocess.CompletedProcess[str]:
        paths = os.pathsep.join([str(self.path), str(ROOT)])
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "NO_COLOR": "1"}
        return subprocess.run(
            [sys.executable, *words], cwd=self.path, env=environment, input=given, capture_output=True, text=True
        )

    def sftmix(self, *words: str) -> None:
        done = self.python(str(ROOT / "cli.py"), *words)
        assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Workspace:
    path = tmp_path_factory.mktemp("workspace")
    found = Workspace(path, make_tiny(path / "tiny"))
    (path / "my-model").symlink_to(found.tiny.model)
    rows = [json.loads(line) for line in found.tiny.train.read_text(encoding="utf-8").splitlines()]
    labelled = [{**row, "quality": "good" if row["kind"] == "deterministic" else "poor"} for row in rows]
    shutil.copytree(ROOT / "docs" / "examples" / "confidence_lab" / "confidence_lab", path / "confidence_lab")
    shutil.copytree(ROOT / "docs" / "examples" / "ideas", path, dirs_exist_ok=True)
    shutil.copytree(ROOT / "benchmarks" / "evidence", path / "benchmarks" / "evidence")
    (path / "rows.json").write_text("\n".join(map(json.dumps, labelled)), encoding="utf-8")
    for block in chain.from_iterable(blocks(page, "python") for page in PAGES):
        if module := re.match(r"# (\w+\.py)\n", block):
            (path / module[1]).write_text(block, encoding="utf-8")
    for run in ("first", "quickstart"):
        (path / "runs" / run).mkdir(parents=True)
        (path / "runs" / run / "config.yaml").write_text(
            "model: {path: tiny/model}\ndata: {train: rows.json, eval_fraction: 0.1}\n"
        )
    (path / "runs" / "table5").mkdir()
    (path / "runs" / "table5" / "compare.yaml").write_text("metric: eval_nll_after\n")
    return found


@pytest.mark.slow
def test_commands_parse(workspace):
    found = [words for page in PAGES for words in map(sftmix_words, commands(page)) if words is not None]
    assert len(found) > 15
    done = workspace.python("-c", DRIVER, given=json.dumps(found))
    assert done.returncode == 0, done.stderr
    codes = json.loads((workspace.path / "codes.json").read_text())
    assert [words for words, code in zip(found, codes, strict=True) if code != 0] == [], done.stderr


# ---------------------------------------------------------------------------------------- what is run


@pytest.fixture(scope="module")
def first(workspace) -> Path:
    """A finished run with every stage, at the place that the examples name."""
    words = [*workspace.tiny.options, "--with_baseline", "--reference.token_nll", "--training.epochs", "1"]
    shutil.rmtree(workspace.path / "runs" / "first")
    workspace.sftmix("run", *words, "--out", "runs/first")
    workspace.sftmix("report", "runs/first", "--map", "0")
    return workspace.path / "runs" / "first"


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=name_of)
def test_python_runs(page, workspace, first):
    script = "\n".join(block for block in blocks(page, "python") if not re.match(r"# \w+\.py\n", block))
    done = workspace.python("-W", "error::DeprecationWarning:__main__", "-c", script)
    assert done.returncode == 0, done.stderr


@pytest.mark.long
@pytest.mark.slow
def test_the_example_components_run(workspace):
    """The commands of the page as they stand there, on the tiny model instead of gpt2."""
    page = ROOT / "docs" / "components.md"
    shown = [words for words in map(sftmix_words, commands(page)) if words and words[0] in ("run", "confidence")]
    shown = [words for words in shown if "FromEndpoint" not in words]  # needs a server
    assert len(shown) == 5
    shutil.rmtree(workspace.path / "runs" / "mine", ignore_errors=True)  # of another page's Python
    for words in shown:
        small = ["--training.global_batch_size", "8", "--training.max_steps", "8", "--training.learning_rate", "0.01"]
        workspace.sftmix(*[str(workspace.tiny.model) if word == "gpt2" else word for word in words], *small)
    mine = workspace.path / "runs" / "mine"
    lines = [json.loads(line) for line in (mine / "train" / "metrics.jsonl").read_text().splitlines()]
    assert [line["mu_effective"] > 0 for line in lines] == [True] * 8
    ratio = [line["mu_effective"] * line["mixup_tokens"] / line["ntp_tokens"] for line in lines]
    assert ratio == pytest.approx([0.4 * (k + 1) / 8 for k in range(8)])
    summary = json.loads((workspace.path / "runs" / "labels" / "summary.json").read_text())
    assert summary["confidence"]["high"]["labels"] == {"good": 1.0}
    assert not (workspace.path / "runs" / "labels" / "reference").exists()


SPLITTER = """
import numpy as np
from my_module import MySplitter
from sftmix.types import Scores

values = np.array([-4.0, np.nan, -6.0, -5.0])
scores = Scores(id=list("abcd"), row=np.arange(4), confidence=values, variability=values, n_tokens=np.arange(4))
split = MySplitter(threshold=-5.0).split(scores, seed=0)
assert (split.confident.tolist(), split.unconfident.tolist(), split.unpaired.tolist()) == ([0, 3], [2], [1])
"""


def test_the_readmes_splitter_splits(workspace):
    done = workspace.python("-c", SPLITTER)
    assert done.returncode == 0, done.stderr


RENDERER = """
from my_thoughts import LightThoughts
from transformers import AutoTokenizer
from sftmix.testing import check_renderer
from sftmix.types import Example, Message

tokenizer = AutoTokenizer.from_pretrained("my-model")
example = Example("x", (Message("user", "Why?"), Message("assistant", "Because.", True, thought="Let me see.")))
check_renderer(LightThoughts(share=0.2), tokenizer, [example])
renderer = LightThoughts(share=0.2)
renderer.begin(tokenizer)
(turn,) = renderer.turns(example)
assert [(tokenizer.decode(ids).strip(), weight) for ids, weight in turn.parts] == [
    ("<think>Let me see.</think>", 0.2), ("Because." + tokenizer.eos_token, 1.0)
]
"""


@pytest.mark.slow
def test_the_renderer_of_the_page_keeps_its_contract(workspace):
    done = workspace.python("-c", RENDERER)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_every_field_of_a_run_is_documented(first):
    text = prose(ROOT / "docs" / "run-directory.md")
    logs = [(first / stage / "metrics.jsonl").read_text() for stage in ("reference", "train")]
    metrics = [json.loads(line) for log in logs for line in log.splitlines()]
    summary, status = (json.loads((first / name).read_text()) for name in ("summary.json", "STATUS.json"))
    named = {*chain.from_iterable(metrics), *summary, *chain.from_iterable(summary["stages"].values()), *status}
    assert not {name for name in named if f"`{name}`" not in text}
    assert {p.name for p in first.iterdir() if p.name != ".lock"} == set(
        re.findall(r"^  ([\w.]+)", blocks(ROOT / "docs" / "run-directory.md", "")[0], re.M)
    )
