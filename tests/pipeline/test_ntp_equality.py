"""Three-way equality of plain SFT on the same batches: ours, transformers' `model(labels=...).loss`, TRL's SFTTrainer.

Real tokenised rows (prompt masked, padded), accumulation over micro-batches of very different token counts, float32.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq

from sftmix.batches.order import Slot, TokenisedRows
from sftmix.data import encode_dataset, prepare
from sftmix.options import DataOptions
from sftmix.ranks.world import World
from sftmix.training.checkpoint import full_weights
from sftmix.training.loop import train
from tests.text.small_tokenizers import make_encoder
from tests.tiny import Tiny, make_tiny
from tests.toy import metrics_of, rounding, toy_stage

MICRO, ACCUMULATION, STEPS = 4, 2, 3
WINDOW = MICRO * ACCUMULATION
ADAMW = {"learning_rate": 0.003, "weight_decay": 0.1, "max_grad_norm": 0.5}
EPS = 0.04  # as the largest gradients: AdamW's own 1e-8 turns the rounding of those near 0 into whole steps


@pytest.fixture(scope="module")
def spread(tmp_path_factory) -> Tiny:
    """Without dropout, and with predictions far from uniform: examples differ in their loss."""
    spread = make_tiny(tmp_path_factory.mktemp("tiny"))
    model = AutoModelForCausalLM.from_pretrained(spread.model)
    model.config.attention_dropout = 0.0
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8 if parameter.ndim >= 2 else 1)
    model.save_pretrained(spread.model)
    return spread


@pytest.fixture(scope="module")
def data(spread) -> TokenisedRows:
    encoder = make_encoder(AutoTokenizer.from_pretrained(spread.model), None)
    options = DataOptions(train=[str(spread.train)])
    return encode_dataset(prepare(options, 0), encoder, max_length=128).train


def examples(data: TokenisedRows, rows: list[int]) -> list[dict[str, list[int]]]:
    """Rows as transformers has them: labels are -100 but for response tokens."""
    chosen = [data[row] for row in rows]
    return [
        {"input_ids": e.input_ids.tolist(), "labels": np.where(e.target, e.input_ids, -100).tolist()} for e in chosen
    ]


def order_of(data: TokenisedRows) -> list[int]:
    """Rows such that the two micro-batches of a window differ much in response tokens: a mean of means would show."""
    few_first = sorted(range(len(data)), key=lambda row: int(data[row].target.sum()))
    picked = []
    for step in range(STEPS):
        picked += few_first[step * MICRO : (step + 1) * MICRO]
        picked += few_first[len(few_first) - (step + 1) * MICRO : len(few_first) - step * MICRO]
    return picked


@pytest.fixture(scope="module")
def ours(spread, data, tmp_path_factory) -> SimpleNamespace:
    rows, directory = order_of(data), tmp_path_factory.mktemp("ours")
    batches = [[(Slot(row),) for row in rows[at : at + WINDOW]] for at in range(0, len(rows), WINDOW)]
    stage = toy_stage(
        directory,
        batches,
        model=AutoModelForCausalLM.from_pretrained(spread.model, dtype=torch.float32),
        data=data,
        options={"micro_batch_size": MICRO, "eps": EPS, **ADAMW},
        pad_id=AutoTokenizer.from_pretrained(spread.model).pad_token_id,
    )
    result = train(stage, World())
    lines = metrics_of(directory)
    return SimpleNamespace(
        loss=[m["loss"] for m in lines], norm=[m["grad_norm"] for m in lines], weights=full_weights(result.module)
    )


def test_transformers_loss_is_ours(spread, data, ours):
    """The first window as one batch, by the model's own loss."""
    model = AutoModelForCausalLM.from_pretrained(spread.model, dtype=torch.float32).train()
    padded = DataCollatorForSeq2Seq(AutoTokenizer.from_pretrained(spread.model))
    loss = model(**padded(examples(data, order_of(data)[:WINDOW])), use_cache=False).loss
    loss.backward()
    assert ours.loss[0] == pytest.approx(float(loss.detach()), rel=1e-6)
    assert ours.norm[0] == pytest.approx(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)), rel=2e-6)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated:FutureWarning")
def test_trl_sft_trainer_is_ours(spread, data, ours, tmp_path):
    """SFTTrainer on the same rows in the same order: loss and gradient norm of every step, and the final weights."""
    from datasets import Dataset
    from torch.utils.data import SequentialSampler
    from trl import SFTConfig, SFTTrainer

    class InOrder(SFTTrainer):
        def _get_train_sampler(self, dataset=None):
            return SequentialSampler(self.train_dataset)

    dataset = Dataset.from_list(examples(data, order_of(data)))
    arguments = SFTConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=MICRO,
        gradient_accumulation_steps=ACCUMULATION,
        max_steps=STEPS,
        lr_scheduler_type="constant",
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        adam_epsilon=EPS,
        seed=0,
        **ADAMW,
    )
    trainer = InOrder(
        model=AutoModelForCausalLM.from_pretrained(spread.model, dtype=torch.float32),
        args=arguments,
        train_dataset=dataset,
        processing_class=AutoTokenizer.from_pretrained(spread.model),
    )
    trainer.train()
    logged = [m for m in trainer.state.log_history if "loss" in m]
    assert len(logged) == STEPS
    assert ours.loss == pytest.approx([m["loss"] for m in logged], rel=2e-6)
    assert ours.norm == pytest.approx([m["grad_norm"] for m in logged], rel=2e-6)
    tokens = sum(len(data[row].input_ids) for row in order_of(data))  # a gradient is a sum over those of a step
    of_steps = rounding(torch.tensor(ADAMW["learning_rate"]), tokens)
    for name, weight in ours.weights.items():
        limit = rounding(weight, 2 * STEPS) + of_steps  # each step takes the decay off, then adds
        torch.testing.assert_close(weight, trainer.model.state_dict()[name], rtol=0, atol=limit)
