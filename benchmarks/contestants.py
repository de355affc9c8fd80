"""Trainers that take turns, step by step, each in a process of its own: TRL's SFTTrainer and ours.

A contestant waits for a message before each of its steps, and reports the time from this message to the end of the
step, with the making of its batches. So a busy machine disturbs all alike, and the memory of each contestant is that of
its process. All train on the same token ids and labels from the same weights.
"""

import contextlib
import os
import tempfile
import warnings
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from benchmarks.measure import Clock, held
from benchmarks.stages import load_rows, ntp_stage, tokens_and_slots
from sftmix.batches.order import RowSubset
from sftmix.components.base import Callback, CallbackResult, StageState
from sftmix.components.objectives import SFTMix
from sftmix.model.load import load_model, load_tokenizer
from sftmix.options import TrainingOptions
from sftmix.ranks.world import World
from sftmix.training.loop import train
from sftmix.training.memory import PeakMemory
from sftmix.training.module import TrainingModule
from sftmix.training.scoring import Scorer

TRL = ("trl_default", "trl_random", "trl_grouped", "trl_best", "trl_liger")
OURS = ("ours_ntp", "ours_sftmix")

CLIP, DECAY = 1.0, 0.1
"""Largest gradient norm and weight decay of every contestant; the learning rate is constant, because both count the
steps of a warm-up from different ends."""

LOGGED = 10
"""Steps whose mean loss TRL's trainer logs as it comes."""


@dataclass
class Turns:
    """The contestant's end of the connection to `trl_compare.py`."""

    line: Connection
    clock: Clock

    def wait(self) -> None:
        self.line.recv()
        self.clock.lap()

    def done(self, *, again: bool) -> None:
        """Report the end of a step, and if there is another; wait for the next message, after the last one as well."""
        self.line.send((self.clock.lap(), again))
        self.wait()


def contestant(name: str, line: Connection, args: Namespace) -> None:
    """Train in turns; then send memory, padding and, with held-out rows, NLLs as a last message."""
    torch.set_num_threads(args.threads)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), tempfile.TemporaryDirectory() as place:
        training, held_out = training_rows(args)
        model = load_model(args.model, attention=attention(name, args)).to(args.device)
        run = trl_run if name in TRL else our_run
        turns = Turns(line, Clock())
        trained, figures = run(name, model, training, turns, args, Path(place))
        sides = {"train": training, "held_out": held_out} if args.held_out else {}
        line.send({**figures, **_losses(trained, sides, args)})


def training_rows(args: Namespace) -> tuple[RowSubset, RowSubset]:
    """Return the first --limit rows to train on, and the --held_out rows after them."""
    both = load_rows(args.model, args.rows, limit=args.limit + args.held_out, max_length=args.max_length)
    rows = torch.arange(len(both)).numpy()
    return RowSubset(both, rows[: args.limit]), RowSubset(both, rows[args.limit :])


def attention(name: str, args: Namespace) -> str | None:
    """Return the attention implementation: TRL keeps padding-free batches apart by flash attention only."""
    return "flash_attention_2" if name in ("trl_best", "trl_liger") and args.device == "cuda" else None


def missing(name: str, args: Namespace) -> str | None:
    """Return what a contestant needs and does not have here."""
    if name == "trl_liger" and args.device != "cuda":
        return "needs a GPU"
    packages = ["flash_attn"] * (attention(name, args) is not None) + ["liger_kernel"] * (name == "trl_liger")
    absent = [package for package in packages if find_spec(package) is None]
    return f"needs {' and '.join(absent)}" if absent else None


def _losses(model: PreTrainedModel, sides: dict[str, RowSubset], args: Namespace) -> dict[str, float]:
    """Return the NLL per response token of each side under the trained model, by the same scorer, in float32."""
    world, found = World(device=torch.device(args.device)), {}
    for name, rows in sides.items():
        scores = Scorer(world=world)(TrainingModule(model.float()), rows)
        found[f"{name}_nll"] = float(scores.nll_sum.sum() / scores.n_tokens.sum())
    return found


@contextlib.contextmanager
def memory_above(model: PreTrainedModel, args: Namespace, figures: dict[str, Any]) -> Iterator[None]:
    """Note the peak memory within the block, above the loaded model and in all, in MiB."""
    ids = torch.ones(1, 8, dtype=torch.int64, device=args.device)
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()  # so that libraries make their buffers now
    model.zero_grad(set_to_none=True)
    before, peak = held(args.device), PeakMemory(torch.device(args.device))
    yield
    figures["peak_mib_above_the_loaded_model"] = (peak.bytes() - before) / 2**20
    figures["peak_mib"] = peak.bytes() / 2**20


# ---------------------------------------------------------------------------------------------- ours


class Announce(Callback):
    """A callback that waits before each step and reports after it; it keeps the NTP losses."""

    def __init__(self, turns: Turns) -> None:
        self._turns, self.losses = turns, list[float]()

    def on_stage_start(self, state: StageState) -> CallbackResult | None:
        self._turns.wait()
        return None

    def on_step_end(self, state: StageState) -> CallbackResult | None:
        self.losses.append(state.metrics["ntp"])
        self._turns.done(again=state.step < state.total_steps)
        return None


def our_run(
    name: str, model: PreTrainedModel, data: RowSubset, turns: Turns, args: Namespace, directory: Path
) -> tuple[PreTrainedModel, dict[str, Any]]:
    options = TrainingOptions(
        global_batch_size=args.global_batch_size,
        micro_batch_size=args.micro_batch_size,
        precision=args.precision,
        epochs=args.epochs,
        learning_rate=args.learning_rate,
        weight_decay=DECAY,
        schedule="constant",
        warmup_ratio=0.0,
        max_grad_norm=CLIP,
    )
    world = World(device=torch.device(args.device))
    figures: dict[str, Any] = {}
    announce = Announce(turns)
    stage = replace(ntp_stage(model, data, options, world, directory), callbacks=[announce])
    if name == "ours_sftmix":
        stage = replace(stage, objective=SFTMix())
    with memory_above(model, args, figures):
        module = train(stage, world).module
    tokens, slots = tokens_and_slots(stage, world, module, stage.order.ends[0])  # the first epoch
    means = {at: fmean(announce.losses[at - LOGGED : at]) for at in range(LOGGED, len(announce.losses) + 1, LOGGED)}
    return model, {**figures, "tokens": tokens, "slots": slots, "losses": means}


# --------------------------------------------------------------------------------------------- TRL's


def trl_options(name: str, args: Namespace) -> dict[str, Any]:
    """Return the options in which this contestant differs from the others of TRL."""
    micro = args.trl_micro_batch_size
    if name == "trl_default":
        return {"per_device_train_batch_size": micro}
    plain = {"gradient_checkpointing": False, "bf16": args.precision == "bf16", "per_device_train_batch_size": micro}
    if name == "trl_random":
        return plain
    grouped = {**plain, "train_sampling_strategy": "group_by_length"}
    if name == "trl_grouped":
        return grouped
    if name == "trl_liger":
        return {**plain, "packing": True, "use_liger_kernel": True}
    if args.device == "cuda":
        whole = {"per_device_train_batch_size": args.trl_best_micro_batch_size}
        return {**plain, **whole, "padding_free": True, "max_length": None}
    return {**grouped, "per_device_train_batch_size": args.trl_best_micro_batch_size}


def trl_run(
    name: str, model: PreTrainedModel, data: RowSubset, turns: Turns, args: Namespace, directory: Path
) -> tuple[PreTrainedModel, dict[str, Any]]:
    from datasets import Dataset, disable_progress_bars
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Announce(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            turns.wait()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            turns.done(again=state.global_step < state.max_steps)

    disable_progress_bars()
    warnings.filterwarnings("ignore", category=FutureWarning)  # transformers warns about names that TRL uses
    encoded = [data[row] for row in range(len(data))]
    own = {"max_length": args.max_length, **trl_options(name, args)}
    if "packing" in own:  # rows are packed up to max_length; a step has about as many tokens as those of the others
        tokens = args.global_batch_size * fmean(len(each.input_ids) for each in encoded)
        own["per_device_train_batch_size"] = max(1, round(tokens / args.max_length))
        own["gradient_accumulation_steps"] = 1
    arguments = SFTConfig(
        output_dir=str(directory),
        num_train_epochs=args.epochs,
        learning_rate=args.learning_rate,
        lr_scheduler_type="constant",
        weight_decay=DECAY,
        max_grad_norm=CLIP,
        use_cpu=args.device == "cpu",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=0,
        **{"gradient_accumulation_steps": args.global_batch_size // own["per_device_train_batch_size"], **own},
    )
    figures: dict[str, Any] = {}
    labels = [np.where(e.target, e.input_ids, -100).tolist() for e in encoded]  # -100: no loss
    rows = Dataset.from_dict({"input_ids": [e.input_ids.tolist() for e in encoded], "labels": labels})
    with memory_above(model, args, figures):
        trainer = SFTTrainer(
            model=model,
            args=arguments,
            train_dataset=rows,
            processing_class=load_tokenizer(args.model),
            callbacks=[Announce()],
        )
        counted = trainer.data_collator = Counted(trainer.data_collator)
        trainer.train()
    losses = {one["step"]: one["loss"] for one in trainer.state.log_history if "loss" in one}
    counts = {"tokens": counted.tokens // args.epochs, "slots": counted.slots // args.epochs}
    return model, {**figures, **counts, "losses": losses}


class Counted:
    """A collator that counts real tokens and slots."""

    def __init__(self, collator: Any) -> None:
        self._collator, self.tokens, self.slots = collator, 0, 0

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        self.tokens += sum(len(row["input_ids"]) for row in rows)
        batch = self._collator(rows)
        self.slots += batch["input_ids"].numel()
        return batch
