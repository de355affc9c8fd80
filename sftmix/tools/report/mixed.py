"""The first pairs that the training mixed, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

from sftmix.batches.collate import collate
from sftmix.batches.order import TrainingOrder
from sftmix.components.base import Need
from sftmix.pipeline.target import pairs_by
from sftmix.tools.report.page import Section
from sftmix.tools.report.run import RunView

PAIRS = 3
TOKENS = 24
"""Most tokens of a response in the tables."""
TEXT = (
    "The first pairs of the first step. The hidden states that predict the n-th tokens of both responses are mixed, "
    "lambda of the first with 1 - lambda of the second; where one has ended, nothing is."
)


def mixed_pairs(view: RunView) -> Section:
    """Return a table for each of these pairs, as the training planned them; an empty section if none can be known.

    So it is for a single run, whose first epoch mixes nothing, for objectives that see the losses of the batch, and for
    a user's own classes, which are not imported.
    """
    config, pairing, data = view.config, view.config.resolved_pairing(), view.rows.data.train
    parts, tables = (pairing, config.objective, config.reference), list[list[list[str]]]()
    unknown = {Need.TARGET_LOSSES, Need.BATCH_NLL} & {*config.reference.needs, *config.objective.needs}
    shipped = all(type(part).__module__.startswith("sftmix.") for part in parts)
    if pairing is not None and view.split is not None and shipped and not unknown:
        groups = view.split, view.scores
        pairs_of = pairs_by(lambda epoch: groups, pairing, config.seed)
        order = TrainingOrder(len(data), pairs_of, options=config.training, seed=config.seed)
        for unit in [unit for unit in order.batch(0) if len(unit) == 2][:PAIRS]:
            batch = collate([unit], data, split=view.split, pad_id=view.rows.encoder.pad_id)
            plan = config.objective.plan(batch, step=0, total_steps=order.total_steps, seed=config.seed)
            if len(plan.lam):
                tables.append(_table(view, [slot.row for slot in unit], plan.lam.tolist()))
    return Section("mixed", "What was mixed with what", TEXT, tables=tables)


def _table(view: RunView, pair: Sequence[int], lam: Sequence[float]) -> list[list[str]]:
    """Return the tokens of two responses beside each other, with lambda where they are mixed; the head first."""
    head, columns = [], []
    for row in pair:
        example = view.rows.data.train[row]
        head.append(f"{view.groups[row] if view.groups else ''} {example.id}")
        predicted = example.input_ids[1:][example.target[1:]].tolist()
        columns.append([str(view.rows.encoder.tokenizer.decode([token])) for token in predicted[:TOKENS]])
    columns.append([f"{share:.2f}" for share in lam[:TOKENS]])
    return [[*head, "lambda"], *map(list, zip_longest(*columns, fillvalue=""))]
