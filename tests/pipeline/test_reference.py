"""Where the dynamics come from: a file, or another model with a tokenizer and a length of its own (contract 7)."""

import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoTokenizer

from sftmix.batches.order import TrainingOrder
from sftmix.common.files import read_json
from sftmix.common.rng import stable_hash
from sftmix.options import TrainingOptions
from sftmix.tools.quickstart import write_rows
from tests.pipeline.test_reference_rows import letters
from tests.tiny import SHORT, groups, metrics, table, weights


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
    assert str(dynamics) in refused(*words, code=3)
    shutil.copy(finished.path / "confidence" / "dynamics.parquet", dynamics)
    made(*words)


@pytest.fixture
def weak(tiny, rows) -> list[str]:
    """Words of a reference whose tokenizer knows letters only; one row has a prompt too long for it."""
    rows[7] = {**rows[7], "instruction": "sort the words " * 8, "input": ""}
    write_rows(tiny.train, rows)
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


def test_a_response_alone_is_scored_beside_it(tiny, made):
    run = made("split", *tiny.options, "--reference.response_alone")
    found = table(run / "confidence" / "dynamics.parquet")
    assert min(found["alone_nll_sum"]) > 0
    assert found["alone_nll_sum"] != found["nll_sum"]


@pytest.mark.parametrize(("places", "steps"), [("[0]", 0), pytest.param("[0, 0.5]", 6, marks=pytest.mark.slow)])
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
