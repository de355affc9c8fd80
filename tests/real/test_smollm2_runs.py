"""SmolLM2-135M-Instruct through the command line: whole runs, their exports and answers, ranks, kills."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.distributed.test_equivalence import losses
from tests.faults.mines import KillIn
from tests.faults.runs import LOOP, digest, from_split, steps
from tests.forked import SIGKILLED, done, ended
from tests.real.conftest import QUESTIONS

pytestmark = [pytest.mark.real, pytest.mark.slow]
STEPS = ("--training.max_steps", "2", "--training.global_batch_size", "4", "--training.micro_batch_size", "2")
RATE = ("--training.learning_rate", "1e-5", "--training.warmup_ratio", "0", "--reference.checkpoints", "1")
SHORT = (*STEPS, *RATE, "--data.max_length", "96", "--model.dtype", "float32", "--checkpoint.every", "0")


def words_of(model: Path, rows: Path, *more: str) -> list[str]:
    return ["run", "--model.path", str(model), "--data.train", str(rows), *SHORT, "--out", "run", *more]


@pytest.fixture(scope="module")
def whole(smollm2, questions, held_out, tmp_path_factory) -> Path:
    """A run with held-out rows and the baseline, in one process and without a fault."""
    place = tmp_path_factory.mktemp("whole")
    done(words_of(smollm2, questions, "--data.eval", str(held_out), "--with_baseline", "true"), cwd=place)
    return place / "run"


def test_what_a_run_reports_is_what_its_export_has(whole, questions):
    """The held-out loss of the summary, by plain transformers on the exported weights, on whole conversations."""
    summary = json.loads((whole / "summary.json").read_text())
    for stage, reported in (("train", summary), ("baseline", summary["baseline"])):
        model = AutoModelForCausalLM.from_pretrained(whole / stage / "model", dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(whole / stage / "model")
        total, count = 0.0, 0
        for asked, answer in QUESTIONS.items():
            prompt = tokenizer.apply_chat_template(
                [{"role": "user", "content": asked}], add_generation_prompt=True, return_dict=False
            )
            ids = [*prompt, *tokenizer(answer + tokenizer.eos_token, add_special_tokens=False)["input_ids"]]
            with torch.no_grad():
                logits = model(torch.tensor([ids])).logits[0, len(prompt) - 1 : -1]
            total += float(torch.nn.functional.cross_entropy(logits, torch.tensor(ids[len(prompt) :]), reduction="sum"))
            count += len(ids) - len(prompt)
        assert reported["eval_nll_after"] == pytest.approx(total / count, rel=1e-5)


def test_answers_in_batches_are_those_of_transformers_one_by_one(whole, questions, tmp_path):
    words = ["generate", str(whole), "--prompts", str(questions), "--to", "answers.jsonl", "--max_new_tokens", "16"]
    done([*words, "--batch_size", "4"], cwd=tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    model = AutoModelForCausalLM.from_pretrained(whole / "train" / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(whole / "train" / "model")
    assert len(rows) == len(QUESTIONS)
    for row, asked in zip(rows, QUESTIONS, strict=True):
        chat = [{"role": "user", "content": asked}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=False)
        made = model.generate(ids, max_new_tokens=16, do_sample=False)[0, ids.shape[1] :]
        (answer,) = row["answers"].values()
        assert answer == tokenizer.decode(made, skip_special_tokens=True).strip()


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # of PEFT, as it loads
def test_adapters_merge_into_the_weights(smollm2, questions, tmp_path):
    lora = ("--model.lora.r", "4", "--training.learning_rate", "1e-3", "--reference.checkpoints", "1")
    done(words_of(smollm2, questions, *lora), cwd=tmp_path)
    done(["export", "run", "--to", "merged", "--merge", "--dtype", "float32"], cwd=tmp_path)
    from peft import AutoPeftModelForCausalLM

    ids = torch.tensor([AutoTokenizer.from_pretrained(tmp_path / "merged")("The capital of France is")["input_ids"]])
    adapted = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "run" / "train" / "model", dtype=torch.float32)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    with torch.no_grad():
        one, other, before = (model.eval()(ids).logits for model in (adapted, merged, base))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-3)
    assert float((other - before).abs().max()) > 0.01


@pytest.mark.long
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_ranks_train_what_one_process_does(parallel, smollm2, questions, held_out, whole, tmp_path):
    """Given the same split; within float32 rounding of two steps of AdamW at 1e-5."""
    run = from_split(whole, tmp_path)
    more = ("--data.eval", str(held_out), "--training.parallel", parallel)
    done(words_of(smollm2, questions, *more), cwd=tmp_path, ranks=2)
    assert losses(run) == pytest.approx(losses(whole), abs=2e-5)
    left, right = (load_file(one / "train" / "model" / "model.safetensors") for one in (run, whole))
    assert left.keys() == right.keys()
    assert max(float((left[name] - right[name]).abs().max()) for name in left) < 1e-5


@pytest.mark.long
def test_a_killed_run_goes_on_bit_for_bit(smollm2, questions, held_out, whole, tmp_path):
    """Killed in the second step of the target, behind a checkpoint; the reference is read back."""
    run = from_split(whole, tmp_path)
    words = words_of(smollm2, questions, "--data.eval", str(held_out), "--checkpoint.every", "1")
    killed = ended(words, cwd=tmp_path, faults=[KillIn(LOOP, "advance", call=2)])
    assert killed.codes == [SIGKILLED]
    assert "resuming after step 1 of 2" in done(words, cwd=tmp_path)
    assert steps(run) == steps(whole)
    assert digest(run) == digest(whole)
    shutil.rmtree(run)


def test_a_model_without_a_tokenizer_is_refused_by_name(smollm2, questions, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).symlink_to(smollm2 / name)
    refused = ended(words_of(bare, questions), cwd=tmp_path)
    assert refused.codes == [2]
    assert "bare" in refused.printed
    assert "tokenizer" in refused.printed
    assert not (tmp_path / "run" / "reference").exists()
