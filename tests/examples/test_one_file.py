"""docs/examples/one_file.py computes what the framework computes, if both draw the same orders, pairs and lambdas."""

import importlib.util
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sftmix.components import RandomPairs
from sftmix.disk.tables import read_dynamics
from sftmix.ranks.rng import generator, stable_hash
from sftmix.text.templates import ALPACA
from sftmix.types import Split
from tests.tiny import ROOT, groups, in_this_process, metrics, weights

FILE = ROOT / "docs" / "examples" / "one_file.py"
EPOCHS, SIZE, SEED = 2, 8, 3
EQUAL = 1e-6
EPS = 1e-4
"""Of AdamW: with a small one, the rounding of a gradient near 0 decides on a whole step of its weight."""


@pytest.fixture(scope="module")
def page():
    """The file as a module."""
    spec = importlib.util.spec_from_file_location("one_file", FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["one_file"] = module  # its dataclasses look for it there
    spec.loader.exec_module(module)
    yield module
    del sys.modules["one_file"]


@pytest.fixture(scope="module")
def of_framework(plain, tmp_path_factory):
    """The whole recipe by the framework."""
    out = tmp_path_factory.mktemp("framework") / "run"
    options = ["--training.epochs", str(EPOCHS), "--training.learning_rate", "0.001", "--training.eps", str(EPS)]
    options += ["--seed", str(SEED)]
    done = in_this_process("run", *plain.options, *options, "--out", str(out), cwd=out.parent)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def settings(page):
    return page.Settings(learning_rate=1e-3, eps=EPS, epochs=EPOCHS, batch_size=SIZE, micro_batch_size=3, checkpoints=2)


@pytest.fixture(scope="module")
def rows(page, plain):
    return page.read_rows(str(plain.train), AutoTokenizer.from_pretrained(plain.model), 128)


def model_of(plain):
    return AutoModelForCausalLM.from_pretrained(plain.model, dtype=torch.float32)


@pytest.fixture(scope="module")
def confidence(page, plain, of_framework, rows, settings):
    """The file's confidences, from the framework's orders."""
    seed = stable_hash(SEED, "reference") % 2**62
    orders = [generator(seed, "order", epoch).permutation(len(rows)).tolist() for epoch in range(EPOCHS)]
    steps = [batch for order in orders for batch in page.batches([(k,) for k in order], SIZE)]
    return page.confidences(model_of(plain), rows, steps, settings)


def test_the_confidence_is_that_of_the_framework(of_framework, confidence):
    stored = read_dynamics(of_framework / "confidence" / "dynamics.parquet")
    np.testing.assert_allclose(confidence, -np.exp(stored.mean_nll).mean(axis=1), rtol=EQUAL)


def test_the_split_is_that_of_the_framework(page, of_framework, confidence):
    confident, unconfident = page.split(confidence)
    group = [*groups(of_framework).values()]
    assert {k for k, name in enumerate(group) if name == "confident"} == set(confident)
    assert {k for k, name in enumerate(group) if name == "unconfident"} == set(unconfident)


def test_the_losses_and_weights_are_those_of_the_framework(page, plain, of_framework, rows, settings):
    names = groups(of_framework)
    ids, places = [*names], {"confident": 0, "unconfident": 1, "unpaired": -1}
    split = Split(group=np.array([places[name] for name in names.values()], dtype=np.int8), names=("c", "u"))
    singles = [(k,) for k in split.unpaired.tolist()]
    steps = []
    for epoch in range(EPOCHS):
        pairs = RandomPairs().pairs(split, None, epoch=epoch, seed=SEED)
        steps += page.batches([*map(tuple, pairs.tolist()), *singles], SIZE)

    def draw(step, i, j):
        return generator(SEED, "lambda", step, ids[i], ids[j]).beta(settings.alpha, settings.alpha, 1)[0]

    model = model_of(plain)
    found = [*page.train(model, rows, steps, settings, draw)]
    np.testing.assert_allclose(found, [(line["ntp"], line["mixup"]) for line in metrics(of_framework)], rtol=EQUAL)
    exported, trained = weights(of_framework), model.state_dict()
    assert max(float((trained[name] - of).abs().max()) for name, of in exported.items()) < EQUAL
    assert min(mixup for _, mixup in found) > 0


def test_a_model_without_a_template_gets_the_prompt_of_the_framework(page, plain):
    """The framework's has two line ends more behind the end of turn, which are not trained."""
    tokenizer = AutoTokenizer.from_pretrained(plain.model)
    turns = [{"role": "user", "content": "Count the words.\nWords: blue fox"}]
    answered = [*turns, {"role": "assistant", "content": "Two."}]
    ours, theirs = (
        [
            tokenizer.apply_chat_template(turns, chat_template=template, add_generation_prompt=True, tokenize=False),
            tokenizer.apply_chat_template(answered, chat_template=template, tokenize=False).rstrip(),
        ]
        for template in (page.TEMPLATE, ALPACA)
    )
    assert ours == theirs


def test_a_row_may_hold_the_line_ends_of_text(page, plain, rows, tmp_path):
    """U+2028 and its like end no line of JSON."""
    first = json.loads(plain.train.read_text(encoding="utf-8").splitlines()[0])
    file = tmp_path / "rows.jsonl"
    told = first | {"instruction": "one\u2028two\x85three"}
    file.write_text(f"{json.dumps(told, ensure_ascii=False)}\n{json.dumps(first)}\n", encoding="utf-8")
    found = page.read_rows(str(file), AutoTokenizer.from_pretrained(plain.model), 128)
    assert [row.n for row in found] == [rows[0].n] * 2
    assert found[1] == rows[0] != found[0]


def test_the_file_is_one_page():
    assert len(FILE.read_text(encoding="utf-8").splitlines()) <= 200


@pytest.mark.slow
def test_it_exports_a_model_by_its_command(plain, tmp_path):
    options = ["--model", str(plain.model), "--rows", str(plain.train), "--out", str(tmp_path / "out")]
    few = ["--epochs", "1", "--batch_size", "16", "--learning_rate", "0.01"]
    done = subprocess.run([sys.executable, str(FILE), *options, *few], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("NTP") == 4  # two steps of the reference, and two of the target
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert not torch.equal(trained["model.norm.weight"], model_of(plain).state_dict()["model.norm.weight"])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template
