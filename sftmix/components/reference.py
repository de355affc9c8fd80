"""References: sources of training dynamics."""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from sftmix.components.base import Reference, ReferenceContext
from sftmix.components.component import KEPT, Need, require
from sftmix.components.shared_scores import fetched_scores, hub_name
from sftmix.disk.places import place_of, places_like
from sftmix.disk.tables import existing_file, read_columns, read_dynamics
from sftmix.options.reference import ReferenceModel, ReferenceTraining
from sftmix.types import TrainingDynamics
from sftmix.words.errors import ConfigError, DataError

Kept = Literal["entropy", "margin", "states"]
SCORINGS = (
    "a number of scorings from 1, a list of either shares of the run (0 is before training, 1 its end) or, if one is "
    "above 1, whole steps"
)


def are_scorings(checkpoints: int | list[float]) -> bool:
    """True for what SCORINGS allows."""
    # 5, [0, 0.5, 1] and [0, 100, 200] are; [0.5, 2], of which one is a step and one a share, and [] are not
    if isinstance(checkpoints, int):
        return checkpoints >= 1
    are_steps = all(float(place).is_integer() for place in checkpoints)
    return min(checkpoints, default=-1) >= 0 and (max(checkpoints) <= 1 or are_steps)


class TrainedReference(Reference):
    """The paper's reference: a separate model is trained by NTP on the same data, and scores every example."""

    def __init__(
        self,
        *,
        model: ReferenceModel | None = None,
        checkpoints: int | list[float] | Literal["online"] = 5,
        token_nll: bool = False,
        response_alone: bool = False,
        keep: list[Kept] | None = None,
        training: ReferenceTraining | None = None,
    ):
        """
        model: another base model with its own tokenizer, template and length; null is the target's own base model.
        checkpoints: the number of scorings, evenly spaced with the last at the end of training; or a list, whose values
            are shares of the run if none is above 1 (0 before training, 1 its end; a share above 0 is at least step 1),
            else optimizer steps; or `online`: no scoring, the loss of each example is taken in its own training step,
            one checkpoint per full epoch.
        token_nll: also keep the NLL of every response token.
        response_alone: also score each response without its instruction (IFD needs it); scoring costs twice as much.
        keep: what else is kept of each response, beside what components need: `entropy` and `margin` of the prediction
            of each token (the latter by one more pass of the LM head), and `states`, the mean input of the LM head at
            the last checkpoint.
        training: differences from the run's `training` options; null inherits them all.
        """
        holds = not (token_nll or response_alone or keep) if checkpoints == "online" else are_scorings(checkpoints)
        allowed = f"{SCORINGS}, or, without token_nll, response_alone and keep, online"
        require(holds, "reference.checkpoints", checkpoints, allowed)
        self.model, self.checkpoints, self.training = model, checkpoints, training
        self.token_nll, self.response_alone, self.keep = token_nll, response_alone, keep
        held = {
            Need.RESPONSE_ALONE: response_alone,
            Need.CORRECT: checkpoints != "online",
            Need.BEFORE_TRAINING: isinstance(checkpoints, list) and 0 in checkpoints,
            **dict.fromkeys(KEPT, checkpoints != "online"),
        }
        self.gives = frozenset(need for need, holds in held.items() if holds)

    def most_checkpoints(self, epochs: float | None) -> int | None:
        if isinstance(self.checkpoints, list):
            return len(set(self.checkpoints))  # at most: in a short run two shares may be one step
        if isinstance(self.checkpoints, int):
            return self.checkpoints
        return None if epochs is None else int(epochs)  # online: one for each full epoch

    def files(self) -> list[str]:
        return [] if self.model is None else self.model.files()

    def collect(self, context: ReferenceContext) -> TrainingDynamics:
        return context.train_and_score(self.checkpoints)


class FromCheckpoints(Reference):
    """Models already on disk score every example; nothing is trained.

    The models may come from any trainer, for instance as the `checkpoint-*` directories of a Trainer's run.
    """

    needs = frozenset({Need.SCORING})

    def __init__(
        self,
        *,
        paths: list[str],
        template: str | None = None,
        max_length: int | None = None,
        token_nll: bool = False,
        response_alone: bool = False,
        keep: list[Kept] | None = None,
    ):
        """
        paths: directories or hub ids of Hugging Face models in the order of their training, at least one; all have
            the tokenizer of the first. A pattern, such as output/checkpoint-*, names directories by their numbers.
        template: as reference.model.template, for that tokenizer.
        max_length: as reference.model.max_length, for the first of them.
        token_nll: also keep the NLL of every response token.
        response_alone: as in TrainedReference: IFD then works for models as they are.
        keep: as in TrainedReference.
        """
        if not paths:
            raise ConfigError("reference.paths is empty; name the directories of the checkpoints")
        self.paths = [  # checkpoint-9 before checkpoint-10
            match
            for path in map(os.fspath, paths)
            for match in sorted(places_like(path), key=lambda name: (len(name), name)) or [path]
        ]
        self.rows = ReferenceModel(template=template, max_length=max_length)
        self.token_nll, self.response_alone, self.keep = token_nll, response_alone, keep
        self.gives = frozenset({Need.CORRECT, *KEPT, *([Need.RESPONSE_ALONE] if response_alone else [])})

    def most_checkpoints(self, epochs: float | None) -> int | None:
        return len(self.paths)

    def files(self) -> list[str]:
        return [*self.paths, *self.rows.files()]

    def collect(self, context: ReferenceContext) -> TrainingDynamics:
        return context.score_models(self.paths, model=self.rows)


class Online(Reference):
    """Single-run SFTMix: no reference model, the target's own losses of one epoch split the data for the next.

    The first epoch is NTP on shuffled examples. From the second on, confidence comes from the loss of each example in
    its own training step, so the whole recipe costs one plain run. This is our variant, not the paper's, which trains a
    reference. As in Dataset Cartography (arXiv 2009.10795), the model changes during an epoch, and dropout is on:
    examples late in an epoch look easier only because the model has learned more.
    """

    needs = frozenset({Need.TARGET_LOSSES})
    gives = frozenset()

    def __init__(self, *, window: int | None = 1):
        """window: number of past epochs that count as checkpoints, at least 1; null: all past epochs."""
        allowed = "1 and above, or null for all epochs"
        require(window is None or window >= 1, "reference.window", window, allowed)
        self.window = window

    def most_checkpoints(self, epochs: float | None) -> int | None:
        return 1  # whatever the window: the first epoch alone splits the second

    def collect(self, context: ReferenceContext) -> TrainingDynamics:
        raise ConfigError("reference Online has no run of its own: its losses come to be while the target is trained")


class FromFile(Reference):
    """The dynamics of an earlier run, read from a dynamics.parquet and joined by example id; nothing is trained."""

    needs = frozenset()
    gives = Reference.gives | {Need.TOKEN_NLL}  # as far as the file has them

    def __init__(self, *, path: str):
        """
        path: the dynamics file; examples missing from it count as not scored, other examples in it are ignored. Or
            `hub:NAME`, scores that `write_scores` made (docs/sharing.md): rows are matched by the hash of their
            text, and each must be there.
        """
        self.path = path

    def files(self) -> list[str]:
        if name := hub_name(str(self.path)):
            return [*fetched_scores(name)]
        return [existing_file("reference.path", self.path)]

    def collect(self, context: ReferenceContext) -> TrainingDynamics:
        if not hub_name(str(self.path)):
            dynamics = read_dynamics(place_of(self.path)).of(context.ids)
            if len(context.ids) and not dynamics.scored.any():
                raise DataError(f"{self.path} holds none of the {len(context.ids)} examples: it is of other data")
            return dynamics
        # Shared scores get the ids of this run: if a text is repeated, its k-th row here gets the k-th scores.
        dynamics_file, rows_file = self.files()
        rows, wanted = read_columns(rows_file, "id", "hash"), numbered(context.content_hashes())
        theirs = dict(zip(numbered(rows["hash"]), rows["id"], strict=True))
        if missing := [one for one, text in zip(context.ids, wanted, strict=True) if text not in theirs]:
            raise DataError(
                f"{self.path} has scores of {len(theirs):,} rows, and {len(missing):,} of the {len(wanted):,} rows of "
                f"this run are not among them (first: {', '.join(missing[:3])}): a score belongs to a text. Train on "
                "the rows that its card names, held out in the same way, or score yours with --reference "
                "TrainedReference"
            )
        dynamics = read_dynamics(dynamics_file).of([theirs[text] for text in wanted])
        return replace(dynamics, ids=list(context.ids))


def numbered(hashes: Sequence[str]) -> list[tuple[str, int]]:
    """Return each hash with the number of equal ones before it: a, b, a -> (a, 0), (b, 0), (a, 1)."""
    seen = Counter[str]()
    numbered = []
    for value in hashes:
        numbered.append((value, seen[value]))
        seen[value] += 1
    return numbered
