"""Runs of other machines, layouts and ranks: what is recorded of them, what is still found, and what is refused."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import sftmix
from sftmix.disk import known
from sftmix.disk.files import commit_directory
from sftmix.model import load
from sftmix.options import TrainingOptions
from sftmix.options.training import LAYOUT
from sftmix.ranks.world import World
from sftmix.tools.verify.window import machines_between, same_bits
from sftmix.training import machine
from sftmix.training.machine import going_on, machine_of
from tests.tiny import sftmix as process
from tests.tools.verify.runs import WORDS, certified, differing, made, one_bit_of_a_weight, replaced, unfinished

ONE, TWO = {"device": "cpu", "cuda": None, "ranks": 1}, {"device": "cpu", "cuda": None, "ranks": 2}


def raise_a_weight(checkpoint: Path, by: float) -> None:
    """Raise a weight of a checkpoint, and write its manifest anew."""
    (file,) = checkpoint.glob("*.safetensors")
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    name = next(name for name in tensors if name.startswith("weights/") and tensors[name].dim() == 2)
    tensors[name][3, 5] += by
    save_file(tensors, file, metadata=metadata)
    manifest = json.loads((checkpoint / "MANIFEST.json").read_text())
    (checkpoint / "MANIFEST.json").unlink()
    about = {name: manifest[name] for name in ("step", "world_size")}
    commit_directory(checkpoint.rename(checkpoint.with_name("staging")), checkpoint, about=about)


# ---------------------------------------------------------------------------------------- what is recorded


def test_a_machine_is_noted_where_it_goes_on():
    made = going_on([], 0, ONE)
    assert going_on(made, 3, ONE) == made == [{"after": 0, **ONE}]
    made = going_on(made, 4, TWO)
    assert made == [{"after": 0, **ONE}, {"after": 4, **TWO}]
    assert [machines_between(made, *steps) for steps in ((0, 4), (2, 6), (4, 6))] == [[ONE], [ONE, TWO], [TWO]]
    unknown = going_on([], 4, TWO)
    assert [machines_between(unknown, *steps) for steps in ((2, 6), (4, 6))] == [[], [TWO]]


def test_only_the_same_machines_give_the_same_bits_and_no_gpu():
    gpu = {**ONE, "cuda": "13.0"}
    assert same_bits([ONE, ONE], ONE)
    assert not any((same_bits([ONE, TWO], TWO), same_bits([], ONE), same_bits([gpu], gpu)))


def test_a_machine_is_its_processor_and_its_libraries():
    found = machine_of(World(), TrainingOptions())
    assert (found["sftmix"], found["torch"]) == (sftmix.__version__, torch.__version__)
    kind, *processor, capability = found["device"].split()
    assert (kind, capability, bool(processor)) == ("cpu", torch.backends.cpu.get_cpu_capability(), True)
    assert json.loads(json.dumps(found)) == found


def test_a_run_without_a_newer_option_is_of_this_machine(copy_of_ntp, sftmix, monkeypatch):
    """Its steps were made as the option's default says, so they have the same bits."""
    monkeypatch.setattr(machine, "LAYOUT", (*LAYOUT, "schedule"))
    found = certified(sftmix, str(copy_of_ntp.run), "--from", "0")
    assert (found.code, found.exact, found.machine["different"]) == (0, True, [])


# ------------------------------------------------------------------------------------- what is still found


@pytest.mark.slow
@pytest.mark.parametrize(("start", "found_in"), [("2", {"weights"}), ("4", {"losses", "weights"})])
def test_a_checkpoint_whose_manifest_was_mended_is_found_by_the_steps_before_it_or_after(
    copy_of_ntp, sftmix, start, found_in
):
    raise_a_weight(copy_of_ntp.run / "train" / "checkpoints" / "step-00000004", by=0.5)
    found = certified(sftmix, str(copy_of_ntp.run), "--from", start)
    assert (found.code, differing(found)) == (4, found_in)


@pytest.mark.slow
def test_an_exported_model_that_nothing_holds_is_not_certified(copy_of_ntp, sftmix):
    """The checkpoint of the last step is gone, and the window ends before it."""
    copy_of_ntp.edit("train/model/model.safetensors", one_bit_of_a_weight)
    shutil.rmtree(copy_of_ntp.run / "train" / "checkpoints" / "step-00000006")
    found = certified(sftmix, str(copy_of_ntp.run), "--from", "2")
    assert (found.code, found.same, found.exact) == (0, True, False)
    (note,) = (f["note"] for f in found.findings if f["same"] is None)
    assert note == "train/model: step 6 has no checkpoint; a window up to this step compares it"
    assert found.sentence.endswith("bit for bit; not compared, at least in part: model")


# --------------------------------------------------------------------------------- resumed, and on more ranks


@pytest.mark.slow
def test_the_model_is_hashed_anew(copy_of_ntp, sftmix, monkeypatch, tmp_path):
    """A note of it from before, which would be believed by a run, is wrong here, and right afterwards."""
    monkeypatch.setenv("SFTMIX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(known, "LARGE", 1)
    load._hash_of.cache_clear()
    model = copy_of_ntp.tiny.model
    right = load.fingerprint(str(model))
    for note in (tmp_path / "cache" / "hashes").iterdir():
        note.write_text(note.read_text().replace('"content": "', '"content": "0'))
    load._hash_of.cache_clear()
    assert load.fingerprint(str(model)) != right
    load._hash_of.cache_clear()
    assert sftmix("verify", str(copy_of_ntp.run), "--from", "4").code == 0
    load._hash_of.cache_clear()
    assert load.fingerprint(str(model)) == right


@pytest.mark.slow
def test_steps_of_another_layout_are_certified_but_for_rounding(copy_of_ntp, sftmix):
    """A run that went on with micro-batches of another size: bit for bit after that, and not accused of the rest."""
    run = copy_of_ntp.run
    unfinished(run, after=4)
    words = ["run", *copy_of_ntp.tiny.options, *WORDS, "--objective", "NTP", "--out", str(run)]
    assert sftmix(*words, "--training.micro_batch_size", "2", "--checkpoint.keep", "2").code == 0
    after, whole = (
        certified(sftmix, str(run), "--from", start, "--steps", str(6 - int(start))) for start in ("4", "0")
    )
    assert (after.code, after.exact) == (0, True)
    assert (whole.code, whole.same, whole.exact, differing(whole)) == (0, True, False, set())
    assert [one["micro_batch_size"] for one in whole.machine["run"]] == [4, 2]
    assert whole.machine["different"] == ["micro_batch_size is 4 in the run and 2 here"]
    how = "but for rounding (micro_batch_size is 4 in the run and 2 here)"
    assert f"examples, losses are the same, {how}; not compared, at least in part: losses, weights" in whole.sentence
    (losses,) = (f for f in whole.findings if f["kind"] == "losses" and f["same"])
    assert losses["exact"] is False


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("start", ["0", "4"])
def test_micro_batches_by_memory_are_those_of_the_run(tmp_path, sftmix, monkeypatch, start):
    """With more memory than the run had, steps from the base model and from a checkpoint are made in its layout."""

    def plan_with(tokens: int) -> None:
        def planned(work, *_, **about):
            return replace(work.options, micro_batch_tokens=tokens, activation_checkpointing=False), "as a test has it"

        monkeypatch.setattr("sftmix.training.choices.planned", planned)

    plan_with(150)
    auto = ("--training.micro_batch_size", "null", "--training.micro_batch_tokens", "auto")
    run = made(tmp_path, "--objective", "NTP", *auto, dropout=0.0).run
    plan_with(999)
    found = certified(sftmix, str(run), "--from", start, "--steps", "2")
    assert (found.code, found.exact, found.machine["different"]) == (0, True, [])
    assert [one["micro_batch_tokens"] for one in found.machine["run"]] == [150]


def test_a_precision_that_this_device_has_not_is_refused(copy_of_ntp, sftmix):
    replaced('"precision": "fp32"', '"precision": "bf16"')(copy_of_ntp.run / "train" / "inputs.json")
    refused = sftmix("verify", str(copy_of_ntp.run))
    assert refused.code == 2
    assert "training.precision auto is another one here" in refused.err


@pytest.mark.parametrize("done", [True, False])
def test_the_ranks_that_a_run_had_are_named_before_anything_is_made(copy_of_ntp, sftmix, done):
    """In figures.json of a stage that is done, else in the newest checkpoint."""
    run = copy_of_ntp.run
    if not done:
        unfinished(run, after=4)
    recorded = "figures.json" if done else "checkpoints/step-00000004/state.json"
    file = run / "train" / recorded
    file.write_text(file.read_text().replace('"ranks": 1', '"ranks": 3'))
    replaced("parallel: auto", "parallel: fsdp")(run / "config.yaml")
    refused = sftmix("verify", str(run), "--from", "0")
    assert (refused.code, "torchrun --nproc_per_node 3 -m sftmix" in refused.err) == (2, True), refused.err


@pytest.mark.long
@pytest.mark.slow
def test_a_run_of_two_ranks_is_verified_by_two_and_by_one(ntp, tmp_path, sftmix):
    words = ["--objective", "NTP", "--training.max_steps", "4", "--checkpoint.every", "2", "--out", f"{tmp_path}/run"]
    done = process("run", *ntp.tiny.options, *words, ranks=2)
    assert done.returncode == 0, done.stderr
    two = process("verify", str(tmp_path / "run"), "--json", ranks=2)
    assert two.returncode == 0, two.stderr
    found = json.loads(two.stdout)
    assert (found["same"], found["exact"], found["machine"]["different"]) == (True, True, [])
    assert found["sentence"] == ("steps 3 to 4 of train replayed: examples, losses, weights are the same, bit for bit")
    by_one = certified(sftmix, str(tmp_path / "run"))
    different = ["ranks is 2 in the run and 1 here", "parallel is ddp in the run and none here"]
    assert (by_one.code, by_one.same, by_one.machine["different"]) == (0, True, different)
