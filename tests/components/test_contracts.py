"""Components that break their contract stop a run with one line: the name, the answer, and what is allowed."""

import json
import re
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest

from sftmix.components.confidence import LEAST
from tests.fast import some_fast
from tests.tiny import SHORT, in_this_process, metrics, table
from tests.tiny import sftmix as in_a_process

BROKEN_MODULE = "tests.components.broken_components"
NUMPY_MODULE = "tests.components.numpy_components"


class Broken(NamedTuple):
    """A component of broken_components.py, and what the error says about it, as regular expressions."""

    kind: str
    name: str
    answer: str
    allowed: str


BROKEN = [
    Broken("splitter", "Listed", r"list", r"sftmix\.types\.scores\.Split"),
    Broken("splitter", "Floats", r"group float64\[29\]", r"whole numbers \[29\]"),
    Broken(
        "confidence",
        "Endless",
        r"confidence of \w+: -inf \(one of 1\)",
        r"a finite number for each example that was scored, NaN for each that was not",
    ),
    Broken("pairing", "Single", r"rows int64\[14\]", r"whole numbers \[-1, 2\]"),
    Broken(
        "pairing",
        "Selfish",
        r"pair 3: \[ *(\d+) +\1\] \(one of 1\)",
        r"two different rows that have a group; leave out all others, they are trained on by NTP then",
    ),
    Broken(
        "pairing",
        "TakesAll",
        r"pair 2: \[ *\d+ +\d+\] \(one of 1\)",
        r"two different rows that have a group; leave out all others, they are trained on by NTP then",
    ),
    Broken("objective", "AtOnce", r"lam 1\.\d+ to [12]\.\d+", r"0 to 1"),
    Broken("objective", "Beyond", r"lam 1\.\d+ to [12]\.\d+", r"0 to 1"),
    Broken("objective", "NoNumber", r"lam nan to nan", r"0 to 1"),
    Broken("objective", "Infinite", r"row_weight inf to inf", r"-3\.4\d+e\+38 to 3\.4\d+e\+38"),
    Broken("objective", "NoPlan", r"dict", r"sftmix\.types\.batch\.Plan"),
    Broken("objective", "FarPairs", r"pairs 1\d+ to \d+", r"0 to \d+"),
    Broken("objective", "Counted", r"ntp_count tensor\(.*\)", r"a finite number \(float or int\), 0 or more"),
    Broken("objective", "Uncounted", r"mixup_count 0 for pairs with a weight", r"above 0, as their number"),
    Broken("objective", "WithoutMu", r"mu 0 for pairs with a weight", r"the mu in their weights, by which .*"),
    Broken("objective", "UncountedNTP", r"ntp_count 0 for tokens with a weight", r"above 0, as their number"),
    Broken("objective", "Vector", r"loss float32\[1\], requires_grad True", r"a tensor \[\], requires_grad True"),
    Broken("objective", "Graphless", r"loss float32\[\], requires_grad False", r"a tensor \[\], requires_grad True"),
    Broken("objective", "Keeper", r"nll float32\[\d+\], requires_grad True", r"a tensor \[\d+\], requires_grad False"),
    Broken(
        "objective", "Stunted", r"nll float32\[\d+\], requires_grad False", r"a tensor \[\d+\], requires_grad False"
    ),
    Broken("objective", "Bare", r"float32\[\]", r"sftmix\.functional\.SFTLoss"),
    Broken("perturbation", "Wide", r"float32\[2, \d+, 32\]", r"embeddings float32\[2, \d+, 32\]"),
    Broken("perturbation", "Cut", r"embeddings without a graph", r"some with one: the input embeddings are trained"),
    Broken("callbacks", "Says", r"dict", r"sftmix\.components\.base\.CallbackResult"),
    Broken("callbacks", "Stops", r"an end of the training from on_step_end\(\)", r"none, as STOP is not in its .*"),
    Broken(
        "callbacks",
        "Evaluates",
        r"the evaluations of a callback before it from on_step_end\(\)",
        r"none, as EVALUATIONS is not in its `gives`",
    ),
    Broken("reference", "Half", r"nll_sum float64\[29, 1\]", r"numbers \[29, 2\]"),
    Broken(
        "reference",
        "Spoilt",
        r"nll_sum of \w+: \[.*nan\] \(one of 1\)",
        r"finite numbers from 0 where n_tokens is above 0",
    ),
    Broken(
        "reference",
        "Gaining",
        r"nll_sum of \w+: \[-0\.5 .*\] \(one of 1\)",
        r"finite numbers from 0 where n_tokens is above 0",
    ),
    Broken("reference", "Owing", r"n_tokens of \w+: -1 \(one of 1\)", r"0 \(not scored\) and above"),
    Broken("reference", "Twice", r"ids of which some are equal", r"each example once"),
    Broken("reference", "Wordless", r"token_nll of \w+, float32\[2, \d+\]", r"floats without a graph \[2, \d+\]"),
    Broken("reference", "Fewer", r"token_nll of 28 examples", r"one array for each of 29"),
    Broken("reference", "Perfect", r"n_correct of \w+: \[.*\] \(one of 1\)", r"0 to n_tokens, or -1 \(not counted\)"),
]

AFTER_THE_REFERENCE = ("objective", "confidence", "splitter", "pairing")


@pytest.fixture(scope="module")
def reference(finished, tmp_path_factory):
    """A run of two steps that has its reference, and no more."""
    place = tmp_path_factory.mktemp("reference")
    assert in_this_process("reference", *finished.tiny.options, *SHORT, "--out", "run", cwd=place).returncode == 0
    return place / "run"


@pytest.mark.parametrize("reference", ["WithPrompts", "Uneven"])
def test_a_scorer_of_rows_gives_the_tokens_of_the_response(reference, finished, tmp_path, sftmix):
    words = (*finished.tiny.bare, *SHORT, "--reference", f"{BROKEN_MODULE}.{reference}")
    ended = sftmix("reference", *words, "--out", str(tmp_path / "run"))
    assert ended.code == 2
    assert re.search(r"returned NLL \[\d+\] and correct \[\d+\] for \w+; allowed: one for each of its \d+", ended.err)


@pytest.mark.parametrize("broken", some_fast(BROKEN, every=4), ids=[broken.name for broken in BROKEN])
def test_a_run_ends_with_one_line(broken, finished, reference, tmp_path, sftmix):
    if broken.kind in AFTER_THE_REFERENCE:  # the reference does not depend on it
        shutil.copytree(reference, tmp_path / "run")
    option = "--callbacks+" if broken.kind == "callbacks" else f"--{broken.kind}"
    words = (*finished.tiny.options, *SHORT, f"{option}={BROKEN_MODULE}.{broken.name}")
    ended = sftmix("run", *words, "--out", str(tmp_path / "run"))
    said = [line for line in ended.err.splitlines() if line.startswith("error")]
    assert ended.code == 2
    assert len(said) == 1
    message = f"error: {broken.kind} {broken.name} returned {broken.answer}; allowed: {broken.allowed}"
    assert re.fullmatch(message, said[0])
    assert not (tmp_path / "run" / "train" / "model").exists()


CHANGES = [("confidence", "Averages"), ("splitter", "Clips"), ("pairing", "Sorts"), ("pairing", "Regroups")]


@pytest.mark.parametrize(("kind", "name"), [*CHANGES, ("selector", "Takes")])
def test_what_other_stages_read_cannot_be_changed(kind, name, finished, reference, tmp_path, sftmix):
    if kind in AFTER_THE_REFERENCE:
        shutil.copytree(reference, tmp_path / "run")
    words = (*finished.tiny.options, *SHORT, f"--{kind}={BROKEN_MODULE}.{name}", "--out", str(tmp_path / "run"))
    with pytest.raises((ValueError, AttributeError), match=r"read-only|'tuple' object"):
        sftmix("run", *words)


def test_the_pairs_of_each_epoch_of_a_single_run_are_looked_at(tiny, tmp_path, sftmix):
    place = tiny.options.index("--reference.checkpoints")
    words = [*tiny.options[:place], *tiny.options[place + 2 :], "--reference=Online", "--out", str(tmp_path / "run")]
    ended = sftmix("run", *words, f"--pairing={BROKEN_MODULE}.SelfishLater")
    assert ended.code == 2
    assert re.search(r"error: pairing SelfishLater returned pair 3: \[ *(\d+) +\1\] \(one of 1\)", ended.err)
    assert {line["epoch"] for line in metrics(tmp_path / "run")} == {0, 1}


def test_dynamics_that_cannot_be_read_back_are_no_finished_stage(tiny, tmp_path, sftmix):
    words = ("split", *tiny.options, *SHORT, f"--reference={BROKEN_MODULE}.Never", "--out", str(tmp_path / "run"))
    for _ in range(2):  # a rerun does not find it done, either
        ended = sftmix(*words)
        assert (ended.code, "dynamics.parquet: it holds no example" in ended.err) == (3, True)
        assert not (tmp_path / "run" / "reference" / "MANIFEST.json").exists()


def test_numbers_of_numpy_and_groups_in_a_list_are_taken(tiny, tmp_path, sftmix):
    parts = (f"--callbacks+={NUMPY_MODULE}.Numpy", f"--splitter={NUMPY_MODULE}.AsList", "--reference=Online")
    ended = sftmix("run", *tiny.bare, *parts, "--training.max_steps", "8", "--out", str(tmp_path / "run"))
    assert ended.code == 0, ended.err
    lines = metrics(tmp_path / "run")
    assert all((line["mine"], line["count"]) == (1.5, 3) for line in lines)
    assert lines[-1]["mixup_tokens"] > 0


def test_examples_that_were_never_learned_rank_last_and_are_in_no_mean(tiny, tmp_path, sftmix):
    rate = [*tiny.options, *SHORT]
    rate[rate.index("0.01")] = "5"  # the perplexity of some examples rises
    out, checkpoints = tmp_path / "run", ("--reference.checkpoints", "[0,0.5,1]")
    place = rate.index("--reference.checkpoints")
    words = [*rate[:place], *rate[place + 2 :], *checkpoints, "--confidence", "LearningPercentage"]
    assert sftmix("split", *words, "--out", str(out)).code == 0
    values = table(out / "confidence" / "confidence.parquet")["confidence"]
    assert min(values) == LEAST
    summary = json.loads((out / "summary.json").read_text(), parse_constant=lambda word: pytest.fail(word))
    means = [group.get("confidence_mean") for group in summary["confidence"].values()]
    assert all(mean is None or abs(mean) < 1e6 for mean in means)


@pytest.mark.slow
@pytest.mark.long
def test_what_one_rank_returned_ends_all_ranks_alike(tiny, tmp_path):
    """The module is in the working directory, as a user may have it."""
    shutil.copy(Path(__file__).with_name("broken_components.py"), tmp_path / "broken_parts.py")
    words = ("run", *tiny.options, *SHORT, "--objective=broken_parts.SecondRank", "--out", str(tmp_path / "run"))
    ended = in_a_process(*words, ranks=2, cwd=tmp_path)
    said = [line for line in ended.stderr.splitlines() if line.startswith("error: objective")]
    assert len(said) == 1
    assert re.search(r"objective SecondRank returned lam 1\.\d+ to [12]\.\d+; allowed: 0 to 1", said[0])
    assert '"exit_code": 2' in (tmp_path / "run" / "STATUS.json").read_text()
