"""SFTMix in TRL (arXiv 2410.05248, ACL 2026): a subclass of SFTTrainer, and its two runs with the paper's settings.

First a reference learns the rows by plain fine-tuning, and scores each of them at five checkpoints:

    accelerate launch trl_sftmix.py --output_dir reference

Then a second instance of the model is trained on the same rows and on mixtures of those that the reference was sure of
with those that it was not:

    accelerate launch trl_sftmix.py --output_dir sftmix --sftmix_split reference/dynamics.parquet

Instead of the first run, `--sftmix_split` may name the split.parquet or dynamics.parquet of a run of `sftmix` on these
rows: their ids here are those that it gives them, hashes of their text. Settings are those of the paper's appendix for
Alpaca-52K and Llama-3.1-8B, on 8 GPUs; any option of SFTConfig can be given. A model of that size needs FSDP, and then
the first run keeps checkpoints in place of DynamicsCallback: see docs/trl.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from transformers import HfArgumentParser
from trl import SFTConfig, SFTTrainer

from sftmix.data.store import content_hash
from sftmix.tools.integrations import DynamicsCallback, SFTMixArguments, SFTMixTrainer
from sftmix.types import Message


@dataclass
class SFTMixConfig(SFTMixArguments, SFTConfig):
    """SFTConfig, and of SFTMixArguments:

    sftmix_split       which rows are confident and which are not
    sftmix_mu          weight of Mixup, 0.2; at 0 the trainer is SFTTrainer
    sftmix_alpha       lambda ~ Beta(alpha, alpha), 0.5
    sftmix_mixup_mean  own: the Mixup sum is divided by the token pairs that are mixed; ntp: by all trained tokens
    """

    learning_rate: float = 2e-6
    weight_decay: float = 0.1
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = 0.1  # below 1 a share of the run
    num_train_epochs: float = 3.0
    per_device_train_batch_size: int = 4  # times 8 GPUs: a global batch of 32; it must be even, as it holds pairs
    max_length: int | None = 2048


class SFTMixSFTTrainer(SFTMixTrainer, SFTTrainer):
    """SFTTrainer with the loss NTP + mu Mixup.

    What SFTMixTrainer, which is shared with axolotl, changes in a Trainer:

    _get_train_sampler        yields a confident row, then an unconfident one, so that a micro-batch holds whole pairs
    get_batch_samples         draws lambda for each pair, and counts tokens and token pairs over all micro-batches and
                              ranks: each of the two sums in the loss is divided by its own count
    forward of the model      with pairs, the last hidden states go to `sftmix.functional.SFTMixLoss`, which never holds
                              the logits; without, it is the forward of TRL
    compute_loss              multiplies the loss by the number of ranks, over which DDP averages gradients

    Here both terms and mu_effective, what Mixup weighs per token where NTP weighs 1, are added to TRL's metrics.
    """

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        training = "sftmix" in inputs
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if training:
            counts = num_items_in_batch.clamp(min=1)  # [tokens, token pairs] of the global batch
            sums = torch.stack([self.outputs["nll"].sum(), self.outputs["mixup"].sum()])
            # TRL averages over micro-batches, where a sum is wanted
            means = self.accelerator.reduce(sums / counts, "sum") * self.current_gradient_accumulation_steps
            own, mixed = self.args.sftmix_mixup_mean == "own", bool(num_items_in_batch[1])
            ratio = (counts[0] / counts[1]).item() if own and mixed else float(mixed)
            shown = dict(zip(("ntp", "mixup"), means.tolist(), strict=True), mu_effective=self.args.sftmix_mu * ratio)
            for name, value in shown.items():
                self._metrics["train"][name].append(value)
        return loss


def prompts(name: str) -> Dataset:
    """Return rows of Alpaca as TRL reads prompts with completions, with the ids that `sftmix` gives them."""

    def row(example):
        parts = [part for part in (example["instruction"], example["input"]) if part.strip()]
        turns = [Message("user", "\n".join(parts)), Message("assistant", example["output"], trained=True)]
        return {"id": content_hash(turns), "prompt": f"{turns[0].content}\n\n", "completion": example["output"]}

    dataset = load_dataset(name, split="train")
    dataset = dataset.filter(lambda example: example["output"].strip())
    return dataset.map(row, remove_columns=dataset.column_names)


@dataclass
class Script:
    """model and dataset: names on the hub, or directories."""

    model: str = "meta-llama/Llama-3.1-8B"
    dataset: str = "tatsu-lab/alpaca"


def main() -> None:
    script, args = HfArgumentParser((Script, SFTMixConfig)).parse_args_into_dataclasses()
    trainer_class = SFTMixSFTTrainer if args.sftmix_split else SFTTrainer
    trainer = trainer_class(script.model, args, train_dataset=prompts(script.dataset))
    if not args.sftmix_split:
        trainer.add_callback(DynamicsCallback(trainer.train_dataset, Path(args.output_dir, "dynamics.parquet")))
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
