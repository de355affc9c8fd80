"""The commands of the pages "Start" and "How to", run one after another by a reader who has rows and a tiny model.

But for the names of models and a few steps they are those of the pages. What is not run is in a table with its reason.
"""

import json
import re
import shutil

import pytest

from tests.test_docs import ROOT, commands, sftmix_words, workspace  # noqa: F401

NAMES = (
    "../README tutorial clean compare lora sharing report evaluation trl distributed verify faq own-loop calibration"
)
READ_IN_ORDER = [ROOT / "docs" / f"{name}.md" for name in NAMES.split()]
NOT_RUN = {
    r"quickstart$": "takes a minute: tests/tools/quickstart",
    r"compare (?!.*--list$)": "trains models for each seed: tests/tools/compare",
    r"report runs/table5 ": "draws a table of compare: tests/tools/report",
    r"evaluate ": "reads rows from the hub, by lm-eval: tests/tools/evaluate",
    r".*(gpt4_1106_preview\.json|question\.jsonl)": "reads files of other projects: tests/tools/answers",
    r".*(hub:|tatsu-lab/)": "reads from the hub: tests/tools/sharing, tests/tools/integrations",
    r".*(recipe:|runs/)alpaca\b": "is for several GPUs",
    r"track .* wandb ": "needs an account",
}
OF_OTHERS = {"HuggingFaceTB/SmolLM2-135M-Instruct", "meta-llama/Llama-3.1-8B", "gpt2", "MODEL"}
"""Models that a reader downloads or names."""
NUMBERS = {"-8": "-400"}
"""A threshold that divides the rows of a model of half a million parameters, and the tiny one's."""
FEW = ["--training.global_batch_size", "8", "--training.max_steps", "6", "--training.warmup_ratio", "0"]
DRIVER = """
import json, sys
from sftmix.cli import main
codes = [main(words) for words in json.load(open(sys.argv[1]))]
json.dump(codes, open("codes.json", "w"))
"""


def shown() -> list[list[str]]:
    """The words of each command once, in the order in which a reader meets them."""
    found = [words for page in READ_IN_ORDER for words in map(sftmix_words, commands(page)) if words]
    return [json.loads(words) for words in dict.fromkeys(map(json.dumps, found))]


def is_run(words: list[str]) -> bool:
    return not any(re.match(pattern, " ".join(words)) for pattern in NOT_RUN)


def as_typed(words: list[str], place: int) -> list[str]:
    """A command for the tiny model, which is `my-model`: few steps, and an export beside it."""
    words = ["my-model" if word in OF_OTHERS else NUMBERS.get(word, word) for word in words]
    if words[0] == "export":
        words = [f"exported-{place}" if word == "my-model" else word for word in words]
    if words[0] in ("run", "split") and "--training.epochs" in words:
        at = words.index("--training.epochs")
        del words[at : at + 2]
    return [*words, *FEW] if words[0] in ("run", "split") else words


def test_what_is_not_run_is_on_a_page():
    joined = [" ".join(words) for words in shown()]
    assert [pattern for pattern in NOT_RUN if not any(re.match(pattern, words) for words in joined)] == []


@pytest.mark.long
@pytest.mark.slow
def test_commands_of_the_pages_run(workspace):  # noqa: F811
    """The first trains `runs/first`, which the others read; two of the tutorial begin from the quickstart's files."""
    path = workspace.path
    shutil.copyfile(path / "rows.json", path / "rows.jsonl")
    shutil.rmtree(path / "runs")
    first, *others = (as_typed(words, place) for place, words in enumerate(filter(is_run, shown())))
    workspace.sftmix(*first)
    shutil.copytree(path / "runs" / "first", path / "runs" / "quickstart")
    (path / "commands.json").write_text(json.dumps(others), encoding="utf-8")
    done = workspace.python("-c", DRIVER, "commands.json", given="")
    assert done.returncode == 0, done.stderr
    codes = json.loads((path / "codes.json").read_text(encoding="utf-8"))
    assert [words for words, code in zip(others, codes, strict=True) if code != 0] == [], done.stderr
    assert len(others) > 25
