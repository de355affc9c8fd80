"""Scoring: the losses of the current model on rows, in eval mode and without gradients, by all ranks together.

`Scorer` scores every row of a data set, `with_batch_nll` the global batch of the next training step.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from sftmix.batches.collate import collate, to_device
from sftmix.batches.order import Slot, TokenisedRows
from sftmix.ranks.world import World
from sftmix.training.module import ModelView, TrainingModule
from sftmix.training.parallel import autocast, unwrap, without_cudnn_if_padded
from sftmix.types import Batch, BatchNLL, Plan, RowLosses
from sftmix.words.errors import BROKEN, NonFiniteError
from sftmix.words.progress import progress_bar

SCORING_TOKENS = 8192
"""Padded tokens per scoring batch on one rank."""
CPU_SCORING_TOKENS = 2048
"""Largest number of padded tokens per scoring batch on a CPU: larger ones leave its caches, and are padded more."""

Column = Any
"""One value for each of B rows: a tensor or an array [B, ...], or a list; the measure decides."""


@dataclass
class Scorer:
    """The scoring of data sets under a (wrapped) module: log-probabilities in float32, sums in float64.

    precision  fp32 or bf16
    keep       what else is kept, of token_nll, entropy, margin and states
    progress   the name of the bar; None: no bar
    """

    world: World
    precision: str = "fp32"
    pad_id: int = 0
    keep: Sequence[str] = ()
    progress: str | None = None

    def __call__(self, module: nn.Module, data: TokenisedRows) -> RowLosses:
        """Return the scores of every row of `data`, in row order."""
        columns = self.columns(module, data, partial(_scores_of, keep=self.keep)) if len(data) else []
        nll_sum, n_tokens, n_correct, *kept = columns or [[] for _ in range(3 + len(self.keep))]  # N entries each
        return RowLosses(
            np.array(nll_sum, dtype=np.float64),
            np.array(n_tokens, dtype=np.int64),
            np.array(n_correct, dtype=np.int64),
            dict(zip(self.keep, kept, strict=True)),
        )

    def columns(
        self, module: nn.Module, data: TokenisedRows, measure: Callable[..., Sequence[Column]]
    ) -> list[list[Any]]:
        """Return the columns of `measure(module, batch=...)` for batches of B rows, of all rows, in row order.

        Every rank has them, and `measure` sees whole weights (`TrainingModule.read`).
        Rows are sorted by length and dealt to the ranks batch by batch. Every rank makes the same number of forward
        passes (a collective under FSDP). The results are joined by row, so that none counts twice.
        """
        world, lengths, mine = self.world, data.lengths, dict[int, tuple[Any, ...]]()
        order = np.argsort(-lengths, kind="stable")  # longest first: memory peaks at the start
        budget = CPU_SCORING_TOKENS if world.device.type == "cpu" else SCORING_TOKENS
        batches = []
        while len(order):
            size = max(1, budget // max(1, int(lengths[order[0]])))  # the first is the longest: what all are padded to
            batches.append(order[:size].tolist())
            order = order[size:]
        rounds = range(0, len(batches), world.size)
        with (
            eval_mode(module, world, self.precision) as target,
            without_cudnn_if_padded(module, lengths),
            progress_bar(self.progress, total=len(rounds), unit=" batches", enabled=world.is_main, leave=False) as bar,
        ):
            for start in rounds:
                # A rank with one batch fewer takes the last one as well.
                rows = batches[min(start + world.rank, len(batches) - 1)]  # 5 batches on 2 ranks: both make the fifth
                units = [(Slot(row, 0.0),) for row in rows]
                batch = collate(units, data, padding_free=target.padding_free, pad_id=self.pad_id)
                measured = target.read(partial(measure, batch=to_device(batch, world.device)))
                on_host = [x.cpu().numpy() if isinstance(x, torch.Tensor) else x for x in measured]
                mine |= zip(rows, zip(*on_host, strict=True), strict=True)
                bar.update()
        by_row = dict[int, Any]()
        for of_rank in world.gather(mine):
            by_row |= of_rank
        return [list(column) for column in zip(*(by_row[row] for row in range(len(data))), strict=True)]


def _scores_of(module: TrainingModule, batch: Batch, keep: Sequence[str]) -> list[Column]:
    """Return sums and numbers of the B examples of a batch, and what is kept of them, in the order of `keep`."""
    view = ModelView(module, lambda: module.hidden_states(batch))
    out = view.sft_loss(batch, scoring_plan(batch), stats=True, entropy="entropy" in keep)
    assert out.correct is not None
    columns: list[Column] = [sum_by_slot(out.nll, batch), batch.n_tokens, sum_by_slot(out.correct, batch)]
    by_name = {"token_nll": out.nll, "entropy": out.entropy}
    for name in keep:
        if name == "states":
            mean = sum_by_slot(view.hidden, batch) / batch.n_tokens.clamp(min=1)[:, None]  # [B, D]
            columns.append(mean.to(torch.float16))
        else:
            figures = by_name.get(name)
            if figures is None:
                figures = view.figures(_margin)  # [T], of logits in chunks
            columns.append(split_by_slot(figures.float(), batch))
    return columns


def _margin(logits: torch.Tensor) -> torch.Tensor:
    first, second = logits.topk(2, dim=-1).values.unbind(-1)  # of [chunk, V]
    return first - second


@contextmanager
def eval_mode(module: nn.Module, world: World, precision: str) -> Iterator[TrainingModule]:
    """Yield the module inside its wrapping for forward passes without dropout and gradients; then restore its mode."""
    target = unwrap(module)
    was_training = target.training
    target.eval()
    with torch.no_grad(), autocast(module, precision, world.device):
        yield target
    target.train(was_training)


def held_out_metrics(scores: RowLosses) -> dict[str, float]:
    """Return the NLL per response token (nats), token accuracy, and the share of rows whose every token is the argmax.

    The last figure is exact match under greedy decoding: greedy decoding returns the reference answer if and only if
    each of its tokens is the argmax given the tokens before. Raises NonFiniteError if the NLL of a row is NaN.
    """
    bad = np.flatnonzero(np.isnan(scores.nll_sum))
    if len(bad):
        raise NonFiniteError(f"{len(bad)} examples have no finite NLL (rows {bad[:5].tolist()}): {BROKEN}")
    tokens = max(int(scores.n_tokens.sum()), 1)
    rows = max(len(scores.n_tokens), 1)
    return {
        "eval_nll": float(scores.nll_sum.sum()) / tokens,
        "eval_accuracy": float(scores.n_correct.sum()) / tokens,
        "eval_exact_match": float((scores.n_correct == scores.n_tokens).sum()) / rows,
    }


# ------------------------------------------------------------------------------------- of one micro-batch


def scoring_plan(batch: Batch) -> Plan:
    """Return a plan that trains nothing, for a pass that only computes NLLs."""
    weight = torch.zeros_like(batch.labels, dtype=torch.float32)
    return Plan(
        row_weight=weight,
        pairs=batch.pairs[:0],
        pair_weight=weight[:0],
        lam=weight[:0],
        ntp_count=0.0,
        mixup_count=0.0,
        unpaired=torch.arange(len(weight), device=weight.device),
    )


def sum_by_slot(values: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Return f64[B, ...], the sums over the token rows [T, ...] of each example of the batch."""
    sums = values.new_zeros(len(batch.ids), *values.shape[1:], dtype=torch.float64)
    return sums.index_put_((batch.slot,), values.double(), accumulate=True)  # CUDA's index_add_ has no order


def split_by_slot(values: torch.Tensor, batch: Batch) -> list[np.ndarray]:
    """Return the token rows [T] of each of the B examples of the batch."""
    return [part.numpy() for part in torch.split(values.cpu(), batch.n_tokens.tolist())]


# ----------------------------------------------------------------------------------- of the global batch


def example_nll(batch: Batch, nll_T: torch.Tensor) -> torch.Tensor:
    """Return f64[4, B] on the device, where nothing is read: row, NLL, tokens and NTP weight of each slot."""
    return torch.stack([batch.rows, sum_by_slot(nll_T, batch), batch.n_tokens, batch.ntp_weight])


def gather_nll(parts: Sequence[torch.Tensor], world: World) -> dict[str, torch.Tensor]:
    """Join what `example_nll` returned on all ranks, on the CPU of every rank; empty if no rank has any.

    These are `row` i64, ascending, `nll_sum` f64 and `n_tokens` i64 of the examples with their turn: a repeat or a
    filler, whose weight is 0, has its turn elsewhere.
    """
    mine = torch.cat(list(parts), dim=1).cpu().numpy() if parts else np.empty((4, 0))  # f64[4, slots]
    whole = torch.from_numpy(np.concatenate(world.gather(mine), axis=1))
    turns = whole[:, whole[3] > 0]  # the fourth: their NTP weights
    row, nll_sum, n_tokens, _ = turns[:, turns[0].argsort()]
    return {"row": row.long(), "nll_sum": nll_sum, "n_tokens": n_tokens.long()} if whole.numel() else {}


def with_batch_nll(
    batches: Sequence[Batch], ids: Sequence[str], module: nn.Module, world: World, precision: str
) -> list[Batch]:
    """Return the micro-batches with the NLL of the whole global batch: one pass without gradients, in eval mode.

    batches  on the host, as the NLL is
    ids      N example ids, by row of the data set
    """
    with eval_mode(module, world, precision) as target:  # each rank has equally many: a forward is a collective
        on_device = [to_device(batch, world.device) for batch in batches]
        parts = [example_nll(batch, target(batch, scoring_plan(batch)).nll) for batch in on_device]
    whole = gather_nll(parts, world)
    rows, nll_sum = whole["row"], whole["nll_sum"].nan_to_num(nan=0.0, posinf=0.0)
    shared = BatchNLL(rows, nll_sum, whole["n_tokens"], [ids[row] for row in rows.tolist()])
    return [replace(batch, batch_nll=shared) for batch in batches]
