"""Where the dynamics come from: a file, or another model with a tokenizer and a length of its own (contract 7)."""

import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sftmix.batches.order import TrainingOrder
from sftmix.common.rng import stable_hash
from sftmix.options import TrainingOptions
from sftmix.tools.quickstart.model import make_tokenizer
from tests.tiny import SHORT, Tiny, groups, metrics, table, weights


def test_dynamics_from_a_file_give_the_same_split_and_the_same_model(finished, tiny, tmp_path, sftmix):
    dynamics = finished.path / "confidence" / "dynamics.parquet"
    run = tmp_path / "run"
    words = ("--reference", "FromFile", "--reference.path", str(dynamics), "--out", str(run))
    assert sftmix("run", *tiny.bare, *words).code == 0
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


def test_a_missing_file_of_dynamics_is_bad_data_and_can_be_put_there(finished, tiny, tmp_path, sftmix):
    """Contract 4: exit 3, naming the path; nothing is remembered that would refuse the file once it is there."""
    dynamics = tmp_path / "dynamics.parquet"
    words = [*tiny.bare, "--reference", "FromFile", "--reference.path", str(dynamics), *SHORT]
    words += ["--out", str(tmp_path / "run")]
    missing = sftmix("split", *words)
    assert missing.code == 3
    assert str(dynamics) in missing.err
    shutil.copy(finished.path / "confidence" / "dynamics.parquet", dynamics)
    assert sftmix("split", *words).code == 0


LONG = "sort the words " * 8


@pytest.fixture
def weak(tiny) -> Tiny:
    """A weaker reference's model, whose tokenizer knows letters only; one row has a prompt too long for it."""
    rows = [json.loads(line) for line in tiny.train.read_text().splitlines()]
    rows[7] = {**rows[7], "instruction": LONG, "input": ""}
    tiny.train.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = make_tokenizer(["x"], vocab_size=262)
    model = AutoModelForCausalLM.from_pretrained(tiny.model)
    config = model.config
    config.vocab_size, config.max_position_embeddings, config.hidden_size = len(tokenizer), 512, 16
    config.head_dim = 4
    path = tiny.model.parent / "weak"
    torch.manual_seed(3)
    type(model)(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return Tiny(path, tiny.train, tiny.eval)


def with_reference(tiny: Tiny, weak: Tiny, *words: str) -> list[str]:
    return [*tiny.options, *SHORT, "--reference.model.path", str(weak.model), *words]


def test_a_weaker_reference_with_another_tokenizer_joins_by_id(tiny, weak, tmp_path, sftmix):
    """Contract 7: an example that it cannot score is unpaired and counted."""
    run = tmp_path / "run"
    done = sftmix("split", *with_reference(tiny, weak, "--reference.model.max_length", "110"), "--out", str(run))
    assert done.code == 0, done.err
    assert "1 examples the reference could not score stay unpaired" in done.out
    target = table(run / "confidence" / "confidence.parquet")
    unscored = [i for i, c in zip(target["id"], target["confidence"], strict=True) if np.isnan(c)]
    assert len(unscored) == 1
    assert [i for i, group in groups(run).items() if group == "unpaired"] == unscored  # 28 are scored: an even number
    dynamics = table(run / "confidence" / "dynamics.parquet")
    tokens = dict(zip(dynamics["id"], dynamics["n_tokens"], strict=True))
    rows = [json.loads(line) for line in tiny.train.read_text().splitlines()]
    letters = AutoTokenizer.from_pretrained(weak.model)
    expected = [len(letters(row["output"], add_special_tokens=False).input_ids) + 1 for row in rows]  # and the end
    expected[7] = 0
    assert [tokens[i] for i in target["id"]] == expected


def test_too_many_unscored_examples_stop_the_run(tiny, weak, tmp_path, sftmix):
    run = tmp_path / "run"
    stopped = sftmix("run", *with_reference(tiny, weak, "--reference.model.max_length", "48"), "--out", str(run))
    assert stopped.code == 3
    assert "raise reference.model.max_length" in stopped.err
    assert not (run / "split").exists()


def test_a_model_that_cannot_be_loaded_is_named_by_its_option(finished, tiny, tmp_path, sftmix):
    absent = str(tmp_path / "absent")
    for words, expected in (
        (["--reference.model.path", absent], f"reference.model.path: {absent} is not a directory"),
        (
            ["--reference", "FromCheckpoints", "--reference.paths", f"[{finished.tiny.model}, {absent}]"],
            f"reference.paths: {absent} is not a directory",
        ),
    ):
        done = sftmix("run", *tiny.options[:6], *SHORT, *words, "--out", str(tmp_path / "run"))
        assert done.code == 2
        assert expected in done.err


def test_a_changed_reference_model_is_refused(tiny, weak, tmp_path, sftmix):
    words = [*with_reference(tiny, weak, "--reference.model.max_length", "110"), "--out", str(tmp_path / "run")]
    assert sftmix("split", *words).code == 0
    file = weak.model / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    refused = sftmix("split", *words)
    assert refused.code == 2
    assert "was made with other inputs" in refused.err


def test_a_weaker_reference_trains_on_the_targets_examples_only(tiny, weak, tmp_path, sftmix):
    """An example that the target dropped (its own length leaves no response token) is none of the reference's."""
    run = tmp_path / "run"
    words = with_reference(tiny, weak, "--reference.model.max_length", "512", "--data.max_length", "40")
    assert sftmix("reference", *words, "--out", str(run)).code == 0
    summary = json.loads((run / "summary.json").read_text())
    kept = summary["data"]["train"]
    assert kept < 29
    scored = pq.read_table(next((run / "reference" / "scores").glob("*.parquet")))
    assert len(scored) == kept


def test_a_response_alone_is_scored_beside_it(tiny, tmp_path, sftmix):
    run = tmp_path / "run"
    assert sftmix("split", *tiny.options, "--reference.response_alone", "--out", str(run)).code == 0
    found = table(run / "confidence" / "dynamics.parquet")
    assert min(found["alone_nll_sum"]) > 0
    assert found["alone_nll_sum"] != found["nll_sum"]


@pytest.mark.parametrize(("places", "steps"), [("[0]", 0), pytest.param("[0, 0.5]", 6, marks=pytest.mark.slow)])
def test_a_reference_stops_after_its_last_scoring(tiny, tmp_path, sftmix, places, steps):
    """The schedule is that of the whole run, so what is scored is what a reference trained to its end has there."""
    words = ["reference", *tiny.bare, "--checkpoint.every", "2", "--reference.checkpoints"]
    scored = []
    for name, wanted in (("run", places), ("whole", f"[{steps}, 12]")):
        assert sftmix(*words, wanted, "--out", str(tmp_path / name)).code == 0
        found = table(tmp_path / name / "confidence" / "dynamics.parquet")
        columns = zip(found["step"], found["id"], found["nll_sum"], strict=True)
        scored.append([values for step, *values in columns if step == steps])
    assert scored[0] == scored[1]
    assert len(metrics(tmp_path / "run", "reference")) == steps
    assert json.loads((tmp_path / "run" / "reference" / "figures.json").read_text())["steps"] == steps


def test_a_stopped_reference_is_continued_where_it_stopped(tiny, tmp_path, sftmix):
    """With and without a checkpoint at its last step: it is trained up to its last scoring and no further."""
    run = tmp_path / "run"
    words = ["reference", *tiny.bare, "--checkpoint.every", "2", "--checkpoint.keep", "9", "--reference.checkpoints"]
    words += ["[0, 3]", "--out", str(run)]
    assert sftmix(*words).code == 0
    first = table(run / "confidence" / "dynamics.parquet")
    for newest in (3, 2):
        (run / "reference" / "MANIFEST.json").unlink()
        (run / "confidence" / "dynamics.parquet").unlink()
        for step in range(newest + 1, 4):
            shutil.rmtree(run / "reference" / "checkpoints" / f"step-{step:08d}", ignore_errors=True)
        done = sftmix(*words)
        assert done.code == 0, done.err
        assert f"resuming after step {newest} of 12" in done.out
        assert len(metrics(run, "reference")) == 3
        assert table(run / "confidence" / "dynamics.parquet") == first
