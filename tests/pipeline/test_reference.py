"""Where the dynamics come from: a file, or another model, with the template and the length of the run where its
tokenizer is the target's, and with its own where it is another (contract 7)."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sftmix.batches.order import TrainingOrder
from sftmix.disk.files import read_json, write_json
from sftmix.options import TrainingOptions
from sftmix.ranks.rng import stable_hash
from sftmix.tools.quickstart import make_tokenizer, write_jsonl
from sftmix.tools.runs.rows import rows_of_run
from tests.text.small_tokenizers import THINKING
from tests.tiny import SHORT, Tiny, groups, metrics, table, weights

LENGTH = 56
"""Of the alpaca template it leaves a response token in each row, and cuts many responses short."""
RUN = ("--data.template", "alpaca", "--data.max_length", str(LENGTH))


def copied(tiny: Tiny, name: str, **changed: object) -> Path:
    """Copy the model, with other values in its config."""
    path = shutil.copytree(tiny.model, tiny.model.parent / name)
    write_json(path / "config.json", {**read_json(path / "config.json"), **changed})
    return path


def padded(tiny: Tiny) -> Path:
    """Copy the model as a Trainer saves it: with the end token for padding, and a chat template of its own."""
    path = copied(tiny, "padded")
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.chat_template = "{% for m in messages %}{{ m.role + '>' + m.content + eos_token }}{% endfor %}"
    tokenizer.chat_template += "{% if add_generation_prompt %}{{ 'assistant>' }}{% endif %}"
    tokenizer.save_pretrained(path)
    return path


def letters(tiny: Tiny) -> Path:
    """Make a model whose tokenizer knows letters only, with a longer context."""
    tokenizer = make_tokenizer(["x"], vocab_size=262)
    model = AutoModelForCausalLM.from_pretrained(tiny.model)
    model.config.vocab_size, model.config.max_position_embeddings = len(tokenizer), 512
    path = tiny.model.parent / "letters"
    torch.manual_seed(3)
    type(model)(model.config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def by_hand(path: Path, tiny: Tiny, length: int, *, alpaca: bool = True) -> list[tuple[float, int]]:
    """Score each turn of each row by the model's own logits: NLL and number of its tokens, of the first `length`.

    Conversations are written in the alpaca template, or rows of one turn in the chat template of the model.
    """
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    turns_scored = []
    for row in map(json.loads, tiny.train.read_text().splitlines()):
        asked = row.get("instruction", "") + (f"\n{row['input']}" if row.get("input") else "")
        contents = [turn["content"] for turn in row.get("messages", [])] or [asked, row["output"]]
        text = tokenizer.bos_token if tokenizer("a").input_ids[0] == tokenizer.bos_token_id else ""
        for asked, said in zip(contents[::2], contents[1::2], strict=True):
            text += f"### Instruction:\n{asked}\n\n### Response:\n"
            if not alpaca:
                chat = [{"role": "user", "content": asked}]
                text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            before = len(text)
            text += said + tokenizer.eos_token
            encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            ids, starts = encoded.input_ids[:length], [start for start, _ in encoded.offset_mapping][:length]
            with torch.no_grad():
                logp = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), -1)
            nll = [-float(logp[t - 1, ids[t]]) for t in range(1, len(ids)) if starts[t] >= before]
            turns_scored.append((sum(nll), len(nll)))
            text += "\n\n"
    return turns_scored


def assert_same(run: Path, expected: list[tuple[float, int]]) -> None:
    found = table(run / "confidence" / "dynamics.parquet")
    nll, counts = map(list, zip(*expected, strict=True))
    assert found["n_tokens"] == counts
    assert found["nll_sum"] == pytest.approx(nll, rel=1e-5)


def on_disk(tiny: Tiny, path: Path, *words: str) -> list[str]:
    kind = ("--reference", "FromCheckpoints", "--reference.paths", f"[{path}]")
    return ["reference", *tiny.bare, *SHORT, *kind, *words]


def scored_before(tiny: Tiny, *words: str) -> list[str]:
    """The words of a reference that is scored before its training."""
    return ["reference", *tiny.bare, *SHORT, "--reference.checkpoints", "[0]", *words]


def other(tiny: Tiny, kind: str, path: Path) -> list[str]:
    """The words of a reference with a model of its own, on disk or trained."""
    return (
        on_disk(tiny, path, *RUN)
        if kind == "on disk"
        else scored_before(tiny, "--reference.model.path", str(path), *RUN)
    )


# ------------------------------------------------------------------------------------- the same tokenizer


@pytest.mark.parametrize("kind", ["on disk", "trained"])
@pytest.mark.parametrize("make", [lambda tiny: copied(tiny, "copy"), padded], ids=["copy", "padded"])
def test_a_reference_with_the_targets_tokenizer_reads_what_the_target_reads(kind, make, tiny, made):
    """A template and a length that are not set are those of the run, also where a Trainer chose another padding."""
    path = make(tiny)
    assert_same(made(*other(tiny, kind, path)), by_hand(path, tiny, LENGTH))
    assert f"reference ({path}): template alpaca, max_length {LENGTH}\n" in made.printed


@pytest.mark.parametrize("alone", ["template", "length", "context"])
def test_what_is_not_set_is_the_runs_and_a_shorter_context_ends_its_length(alone, tiny, made):
    path = copied(tiny, "copy", **({"max_position_embeddings": LENGTH} if alone == "context" else {}))
    words = {
        "template": scored_before(tiny, "--reference.model.template", "alpaca", "--data.max_length", str(LENGTH)),
        "length": on_disk(tiny, path, "--data.template", "alpaca", "--reference.max_length", str(LENGTH)),
        "context": on_disk(tiny, path, "--data.template", "alpaca"),
    }[alone]
    assert_same(made(*words), by_hand(path, tiny, LENGTH))


# ---------------------------------------------------------------------------------------- another tokenizer


@pytest.mark.parametrize("kind", ["on disk", "trained"])
def test_another_tokenizer_has_a_template_and_a_length_of_its_own_and_they_are_told(kind, tiny, made):
    path = letters(tiny)
    assert_same(made(*other(tiny, kind, path)), by_hand(path, tiny, 512, alpaca=False))
    assert f"reference ({path}): template tokenizer, max_length 512\n" in made.printed


# --------------------------------------------------------------------------------- conversations of several turns


def two_templates(tiny: Tiny, rows: list[dict], target: str, reference: str) -> list[str]:
    """Make the training rows conversations, the first four of two turns, and return the words of a reference with a
    template of its own."""
    turns = [
        [{"role": "user", "content": row["instruction"]}, {"role": "assistant", "content": row["output"]}]
        for row in rows
    ]
    chats = [turn + (turns[-1 - i] if i < 4 else []) for i, turn in enumerate(turns)]
    write_jsonl(tiny.train, [{"id": f"c{i}", "messages": messages} for i, messages in enumerate(chats)])
    template = tiny.model.parent / "thinking.jinja"
    template.write_text(THINKING)
    names = {"alpaca": "alpaca", "thinking": str(template)}
    own = ("--data.template", names[target], "--reference.template", names[reference])
    return on_disk(tiny, tiny.model, "--data.multi_turn", "whole", *own)


@pytest.mark.slow
def test_a_reference_reads_as_turns_what_the_target_splits(tiny, rows, made):
    """Its own template would keep the conversation whole, whose one score belongs to no turn."""
    run = made(*two_templates(tiny, rows, "thinking", "alpaca"))
    found = table(run / "confidence" / "dynamics.parquet")["id"]
    assert found[:3] == ["c0@turn0", "c0@turn1", "c1@turn0"]
    assert_same(run, by_hand(tiny.model, tiny, 512))


def test_a_reference_that_splits_what_the_target_reads_whole_is_refused(tiny, rows, refused):
    """Its scores of turns are none of the conversation."""
    told = refused(*two_templates(tiny, rows, "alpaca", "thinking"), code=3)
    assert "cannot encode 4 of 29 training examples" in told
    assert "4 conversations not scored: split by this template, not by the target's" in told
    assert "max_length" not in told


def test_dynamics_from_a_file_give_the_same_split_and_the_same_model(finished, tiny, made):
    dynamics = finished.path / "confidence" / "dynamics.parquet"
    run = made("run", *tiny.bare, "--reference", "FromFile", "--reference.path", str(dynamics))
    assert not (run / "reference" / "metrics.jsonl").exists()
    assert groups(run) == groups(finished.path)
    ours, theirs = weights(run), weights(finished.path)
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)


def test_the_reference_has_random_streams_of_its_own(finished):
    """Its order is that of shuffled singles under a seed made of the run's, not the one that NTP has in the target."""
    dynamics = table(finished.path / "confidence" / "dynamics.parquet")  # in file order, a line for each checkpoint
    counts = list(dict(zip(dynamics["id"], dynamics["n_tokens"], strict=True)).values())

    def per_step(seed: int) -> list[int]:
        options = TrainingOptions(global_batch_size=8)
        order = TrainingOrder(len(counts), lambda epoch: None, options=options, seed=seed)
        return [sum(counts[unit[0].row] for unit in order.batch(step)) for step in range(order.total_steps)]

    found = [m["ntp_tokens"] for m in metrics(finished.path, "reference")]
    assert found == per_step(stable_hash(42, "reference") % 2**62)
    assert found != per_step(42)


def test_a_missing_file_of_dynamics_is_bad_data_and_can_be_put_there(finished, tiny, tmp_path, made, refused):
    """Contract 4: exit 3, naming the path; nothing is remembered that would refuse the file once it is there."""
    dynamics = tmp_path / "dynamics.parquet"
    words = ["split", *tiny.bare, "--reference", "FromFile", "--reference.path", str(dynamics), *SHORT]
    words += ["--training.parallel", "fsdp"]  # no ranks are needed to read a file
    assert str(dynamics) in refused(*words, code=3)
    shutil.copy(finished.path / "confidence" / "dynamics.parquet", dynamics)
    made(*words)


@pytest.fixture
def weak(tiny, rows) -> list[str]:
    """Words of a reference whose tokenizer knows letters only; one row has a prompt too long for it."""
    rows[7] = {**rows[7], "instruction": "sort the words " * 8, "input": ""}
    write_jsonl(tiny.train, rows)
    return [*tiny.options, *SHORT, "--reference.model.path", str(letters(tiny)), "--reference.model.max_length"]


def test_a_weaker_reference_with_another_tokenizer_joins_by_id(tiny, rows, weak, made):
    """Contract 7: an example that it cannot score is unpaired and counted."""
    run = made("split", *weak, "110")
    assert "1 examples the reference could not score stay unpaired" in made.printed
    target = table(run / "confidence" / "confidence.parquet")
    unscored = [i for i, c in zip(target["id"], target["confidence"], strict=True) if np.isnan(c)]
    assert len(unscored) == 1
    assert [i for i, group in groups(run).items() if group == "unpaired"] == unscored  # 28 are scored: an even number
    dynamics = table(run / "confidence" / "dynamics.parquet")
    tokens = dict(zip(dynamics["id"], dynamics["n_tokens"], strict=True))
    tokenizer = AutoTokenizer.from_pretrained(tiny.model.parent / "letters")
    expected = [len(tokenizer(row["output"], add_special_tokens=False).input_ids) + 1 for row in rows]  # and the end
    expected[7] = 0
    assert [tokens[i] for i in target["id"]] == expected


def test_too_many_unscored_examples_stop_the_run(weak, tmp_path, refused):
    assert "raise reference.model.max_length" in refused("run", *weak, "48", code=3)
    assert not (tmp_path / "run" / "split").exists()


def test_a_model_that_cannot_be_loaded_is_named_by_its_option(finished, tiny, tmp_path, refused):
    absent = str(tmp_path / "absent")
    on_disk = ["--reference", "FromCheckpoints", "--reference.paths", f"[{finished.tiny.model}, {absent}]"]
    for words in (["--reference.model.path", absent], on_disk):
        assert f"{words[-2].removeprefix('--')}: {absent} is not a directory" in refused("run", *tiny.bare, *words)


def test_options_of_the_references_rows_are_named_as_its_own(finished, tiny, refused):
    on_disk = ["--reference", "FromCheckpoints", "--reference.paths", f"[{finished.tiny.model}]"]
    wrong = {
        "reference.model.max_length is 1; allowed: at least 2": ["--reference.model.max_length", "1"],
        "reference.max_length is -5; allowed: at least 2": [*on_disk, "--reference.max_length", "-5"],
        "reference.model.template: 'absent.jinja'": ["--reference.model.template", "absent.jinja"],
    }
    for problem, words in wrong.items():
        assert problem in refused("run", *tiny.bare, *words)


def test_models_that_read_the_first_ones_rows_have_its_tokens(tiny, refused):
    """Ids of another tokenizer would be other words to it; one without a tokenizer is taken at its word."""
    own, other = copied(tiny, "copy"), copied(tiny, "other")
    for file in own.glob("token*"):
        file.unlink()
    make_tokenizer(["zz yy xx zzyyxx"], vocab_size=270).save_pretrained(other)
    assert f"reference.paths: {other} has another tokenizer" in refused(*on_disk(tiny, f"{tiny.model}, {own}, {other}"))


def test_a_changed_reference_model_is_refused(tiny, weak, made, refused):
    made("split", *weak, "110")
    file = tiny.model.parent / "letters" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert "was made with other inputs" in refused("split", *weak, "110")


def test_a_weaker_reference_trains_on_the_targets_examples_only(weak, made):
    """An example that the target dropped (its own length leaves no response token) is none of the reference's."""
    run = made("reference", *weak, "512", "--data.max_length", "40")
    kept = read_json(run / "summary.json")["data"]["train"]
    assert kept < 29
    assert len(pq.read_table(next((run / "reference" / "scores").glob("*.parquet")))) == kept


@pytest.mark.parametrize("kind", ["on disk", "trained"])
def test_responses_alone_are_scored_beside_the_rest_and_give_ifd(kind, tiny, made):
    """By the untrained model's own logits, row by row: after the instruction, and after the first token alone."""
    words = ["--reference", "FromCheckpoints", "--reference.paths", f"[{tiny.model}]"]
    if kind == "trained":
        words = [*SHORT, "--reference.checkpoints", "[0]"]
    run = made("split", *tiny.bare, *words, "--confidence", "IFD", "--reference.response_alone")
    found, scores = table(run / "confidence" / "dynamics.parquet"), table(run / "confidence" / "confidence.parquet")
    model = AutoModelForCausalLM.from_pretrained(tiny.model).eval()
    data = rows_of_run(run)[1].data.train
    for row in range(0, len(data), 7):
        ids, target = (torch.from_numpy(np.asarray(x)) for x in (data[row].input_ids, data[row].target))
        sums = []
        for some in (torch.ones_like(target), target | (torch.arange(len(target)) == 0)):
            with torch.no_grad():
                logits = model(input_ids=ids[some][None]).logits[0].double()
            nll = -logits.log_softmax(-1)[:-1].gather(1, ids[some][1:, None])[:, 0]
            sums.append(float(nll[target[some][1:]].sum()))
        assert found["id"][row] == data.ids[row]
        assert found["nll_sum"][row] == pytest.approx(sums[0], rel=1e-5)
        assert found["alone_nll_sum"][row] == pytest.approx(sums[1], rel=1e-5)
        assert scores["confidence"][row] == pytest.approx(-sums[0] / sums[1], rel=1e-5)


def test_an_online_reference_without_a_whole_epoch_is_refused_before_it_is_trained(tiny, refused, tmp_path):
    words = ("--reference.checkpoints", "online", "--reference.training.max_steps", "2")
    assert "no epoch of the reference is whole" in refused("reference", *tiny.bare, *words)
    assert not (tmp_path / "run" / "reference" / "metrics.jsonl").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("places", "steps"), [("[0]", 0), ("[0, 0.5]", 6)])
def test_a_reference_stops_after_its_last_scoring(tiny, made, places, steps):
    """The schedule is that of the whole run, so what is scored is what a reference trained to its end has there."""
    scored = []
    for name, wanted in (("whole", f"[{steps}, 12]"), ("run", places)):
        run = made("reference", *tiny.bare, "--checkpoint.every", "2", "--reference.checkpoints", wanted, out=name)
        found = pq.read_table(run / "confidence" / "dynamics.parquet").to_pandas()
        scored.append(found[found.step == steps][["id", "nll_sum"]].to_numpy().tolist())
    assert scored[0] == scored[1]
    assert len(metrics(run, "reference")) == steps
    assert read_json(run / "reference" / "figures.json")["steps"] == steps


@pytest.mark.slow
def test_a_stopped_reference_is_continued_where_it_stopped(tiny, made):
    """With and without a checkpoint at its last step: it is trained up to its last scoring and no further."""
    words = ["reference", *tiny.bare, "--checkpoint.every", "2", "--checkpoint.keep", "9", "--reference.checkpoints"]
    run = made(*words, "[0, 3]")
    first = table(run / "confidence" / "dynamics.parquet")
    for newest in (3, 2):
        (run / "reference" / "MANIFEST.json").unlink()
        (run / "confidence" / "dynamics.parquet").unlink()
        for step in range(newest + 1, 4):
            shutil.rmtree(run / "reference" / "checkpoints" / f"step-{step:08d}", ignore_errors=True)
        made(*words, "[0, 3]")
        assert f"resuming after step {newest} of 12" in made.printed
        assert len(metrics(run, "reference")) == 3
        assert table(run / "confidence" / "dynamics.parquet") == first


OWN = """
import numpy as np
from sftmix.components import ConfidenceEstimator, Need, RandomPairs


class Own(ConfidenceEstimator):
    needs = frozenset({Need.ENTROPY, Need.MARGIN, Need.TEXTS})

    def estimate(self, dynamics):
        sums = [e.sum() + m.sum() for e, m in zip(dynamics.token_entropy, dynamics.token_margin, strict=True)]
        return np.array(sums, dtype=np.float64) + [len(asked) for asked, _ in dynamics.texts]


class ByStates(RandomPairs):
    needs = frozenset({Need.MEAN_STATES})

    def pairs(self, split, scores, *, epoch, seed):
        np.save("states.npy", scores.states)
        return super().pairs(split, scores, epoch=epoch, seed=seed)
"""


def test_what_components_need_is_kept_without_an_option(tiny, made, refused, tmp_path, monkeypatch):
    """By the untrained model's own logits and states, row by row."""
    (tmp_path / "own_needs.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    scores = ("--reference", "FromCheckpoints", "--reference.paths", f"[{tiny.model}]")
    needy = ("--confidence", "own_needs.Own", "--pairing", "own_needs.ByStates")
    run = made("run", *tiny.bare, *SHORT, *scores, *needy)
    found = table(run / "confidence" / "confidence.parquet")["confidence"]
    model, states = AutoModelForCausalLM.from_pretrained(tiny.model).eval(), np.load("states.npy")
    data = rows_of_run(run)[1].data.train
    for row in range(0, len(data), 7):
        ids, target = (torch.from_numpy(np.asarray(x)) for x in (data[row].input_ids, data[row].target))
        with torch.no_grad():
            out = model(input_ids=ids[None], output_hidden_states=True)
        before = torch.nonzero(target[1:])[:, 0]
        log_p = out.logits[0, before].double().log_softmax(-1)
        first, second = log_p.topk(2).values.unbind(-1)
        (turn,) = [one for one in data.example(row).messages if one.role == "user"]
        expected = float(-(log_p.exp() * log_p).sum() + (first - second).sum()) + len(turn.content)
        assert found[row] == pytest.approx(expected, rel=1e-3)  # the file has float16
        np.testing.assert_allclose(states[row], out.hidden_states[-1][0, before].mean(0), rtol=2e-3, atol=2e-3)
    # finished without: refused before anything is computed; a file without says which field it lacks
    made("confidence", *tiny.bare, *scores, out="plain")
    said = refused("split", *tiny.bare, *scores, *needy, out="plain")
    assert "did not keep the same" in said
    assert "reference.keep" in said
    file = ("--reference", "FromFile", "--reference.path", str(tmp_path / "plain" / "confidence" / "dynamics.parquet"))
    said = refused("split", *tiny.bare, *file, *needy, out="file", code=3)
    assert "confidence Own needs the entropy of the prediction of each token" in said
    assert "token_entropy" in said
