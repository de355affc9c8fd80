"""What the loss of an objective may ask of the model, inside its wrapped forward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeAlias

from sftmix.types import Batch, Plan, Tensor
from sftmix.words.errors import ConfigError

if TYPE_CHECKING:
    from sftmix import functional

SFTLoss: TypeAlias = "functional.SFTLoss"
"""The result of a loss, for component modules, which import no torch."""

_STEPS_ALONE = (
    "callbacks MeasureMixing and an objective that mixes embeddings or states exclude each other: it measures mixtures "
    "of the head's inputs; leave it out"
)


_OF_HEAD = ("weight", "bias", "softcap", "scale")
"""What logits are made of beside states."""
_OF_ROWS = ("nll", "correct", "entropy")
"""Fields of an SFTLoss with a value for each token row."""


@dataclass(frozen=True)
class Taught:
    """A teacher's part in one micro-batch, all of it detached.

    hidden  [T, D], the inputs of its head that predict the response tokens
    weight, bias, softcap, scale  of its head, as of `LossView.head`
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    scale: float

    def logits(self, hidden: Tensor) -> Tensor:
        """Return [r, V], the logits of r rows of `hidden`: hand these rows to `chunked_loss` as a column."""
        import torch

        from sftmix.functional import logits_of

        with torch.no_grad():
            logits = logits_of(hidden, **self._formula)
            return logits if self.bias is None else logits.clamp(min=-1e30)  # finite, as those of `chunked_loss` are

    def figures(self, f: Callable[..., Tensor], *columns: Tensor) -> Tensor:
        """Return [T], `f` of the teacher's logits of each response token, as `LossView.figures` of the trained ones."""
        import torch

        from sftmix.functional import chunked_loss

        with torch.no_grad():
            return chunked_loss(self.hidden, f, *columns, **self._formula).each

    @property
    def _formula(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _OF_HEAD}


class LossView:
    """The head's inputs and the head, as `Objective.loss` sees them; in training also with `states`.

    head  has weight [V, D], bias [V] or None, softcap and scale (`sftmix.model.head.Head`)
    """

    def __init__(
        self,
        head: Any,
        hidden: Callable[[], Tensor],
        *,
        chunk_size: int | None = None,
        rows: int | None = None,
        teacher: Taught | None = None,
    ):
        self.head, self._teacher = head, teacher
        self._hidden, self._chunk_size, self._rows = hidden, chunk_size, rows

    @cached_property
    def _states(self) -> Tensor:
        return self._hidden()

    @property
    def hidden(self) -> Tensor:
        """[T, D], the inputs of the head that predict the response tokens: one pass of the backbone, made once."""
        return self._states if self._rows is None else self._states[: self._rows]

    @property
    def teacher(self) -> Taught:
        """The teacher's states of this micro-batch, and its head, in a training step (Need.TEACHER)."""
        if self._teacher is None:
            raise ConfigError("view.teacher is there in training steps of an objective with Need.TEACHER in `needs`")
        return self._teacher

    @property
    def prompt_hidden(self) -> Tensor:
        """[Q, D], the inputs of the head that predict the tokens of `batch.prompt`, of the same pass (Need.PROMPTS)."""
        return self._states[len(self._states) if self._rows is None else self._rows :]

    @cached_property
    def _formula(self) -> dict[str, Any]:
        # An adapted head computes its weight at each use.
        return {name: getattr(self.head, name) for name in _OF_HEAD} | {"chunk_size": self._chunk_size}

    def sft_loss(
        self,
        batch: Batch,
        plan: Plan,
        *,
        rule: Callable[[Tensor, Tensor], Tensor] | None = None,
        label_smoothing: float = 0.0,
        stats: bool = False,
        entropy: bool = False,
    ) -> SFTLoss:
        """Return the fused NTP + Mixup loss of a plan (`sftmix.functional.sft_loss`), with its prompts' tokens.

        rule  (nll, entropy) -> factor of each row's weight, elementwise, detached
        """
        from sftmix.functional import sft_loss

        prompts = plan.prompt_weight is not None
        rows = self._with_prompts(batch, plan) if prompts else {"hidden": self.hidden, "labels": batch.labels}
        of_plan = {name: getattr(plan, name) for name in ("pairs", "lam", "row_weight", "pair_weight", "unpaired")}
        options = {"rule": rule, "label_smoothing": label_smoothing, "stats": stats, "entropy": entropy}
        out = sft_loss(**{**self._formula, **of_plan, **options, **rows})
        if not prompts:
            return out
        of_rows = {name: column[: self._rows] for name in _OF_ROWS if (column := getattr(out, name)) is not None}
        return out._replace(**of_rows, prompt=out.nll[self._rows :])

    def _with_prompts(self, batch: Batch, plan: Plan) -> dict[str, Tensor | None]:
        """Return states, labels, weights and rows in no pair, of response tokens and, behind them, of the prompts'."""
        import torch

        labels, unpaired = torch.cat([batch.labels, batch.prompt.labels]), plan.unpaired  # type: ignore[union-attr]
        if unpaired is not None:
            unpaired = torch.cat([unpaired, torch.arange(len(batch.labels), len(labels), device=unpaired.device)])
        weights = torch.cat([plan.row_weight, plan.prompt_weight])  # type: ignore[list-item]
        return {"hidden": self._states, "labels": labels, "row_weight": weights, "unpaired": unpaired}

    def chunked_loss(
        self,
        hidden: Tensor | Sequence[Tensor],
        f: Callable[..., Tensor],
        *columns: Tensor,
        row_weight: Tensor | None = None,
    ) -> functional.ChunkedLoss:
        """Return sum_r row_weight_r f(logits_r), without holding all logits (`sftmix.functional.chunked_loss`)."""
        from sftmix.functional import chunked_loss

        return chunked_loss(hidden, f, *columns, row_weight=row_weight, **self._formula)

    def figures(self, f: Callable[..., Tensor], *columns: Tensor) -> Tensor:
        """Return [T], `f` of the logits of each response token as in `chunked_loss`, detached: one pass of the head."""
        import torch

        hidden = self.hidden
        with torch.no_grad():
            return self.chunked_loss(hidden, f, *columns).each

    @property
    def layers(self) -> int:
        """The number of decoder layers."""
        raise ConfigError(_STEPS_ALONE)

    def states(
        self,
        input_ids: Tensor,
        mask: Tensor,
        *,
        layer: int | None = None,
        change: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Return states [R, L, D] at every place of R lines: one more pass of the backbone.

        They are the inputs of the head or, of a layer without a change, the states after it.

        input_ids  i64[R, L]
        mask       bool[R, L], the real tokens; positions count them
        layer      a decoder layer, from 1 to `layers`, whose states are in front of the last norm, unlike `hidden`;
                   0: the input embeddings, as the embedding module returns them.
                   None: 0 with a change, else the inputs of the head
        change     replaces the states [R, L, D] after the layer; a perturbation changes `hidden` alone. ConfigError for
                   a model that keeps several states of each token between its layers (Gemma 3n)
        Call it on every rank in every step, whatever the batch holds: under FSDP a pass is a collective.
        """
        raise ConfigError(_STEPS_ALONE)  # in a training step the view is one that can
