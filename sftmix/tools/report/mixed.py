"""The first pairs that the training mixed, token by token."""

from __future__ import annotations

from itertools import zip_longest

import numpy as np

from sftmix.batches.collate import collate
from sftmix.batches.order import TrainingOrder
from sftmix.components.base import Need
from sftmix.pipeline.pairs import one_split
from sftmix.tools.report.look import pieces
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
    parts, section = (pairing, config.objective, config.reference), Section("mixed", "What was mixed with what", TEXT)
    unknown = {Need.TARGET_LOSSES, Need.BATCH_NLL} & {*config.reference.needs, *config.objective.needs}
    shipped = all(type(part).__module__.startswith("sftmix.") for part in parts)
    if pairing is None or view.split is None or unknown or not shipped:
        return section
    pairs_of = one_split(view.split, view.scores, pairing, config.seed).pairs_of
    order = TrainingOrder(len(data), pairs_of, options=config.training, seed=config.seed)
    tables = []
    for unit in [unit for unit in order.batch(0) if len(unit) == 2][:PAIRS]:
        batch = collate([unit], data, split=view.split, pad_id=view.rows.encoder.pad_id)
        plan = config.objective.plan(batch, step=0, total_steps=order.total_steps, seed=config.seed)
        examples = [data[slot.row] for slot in unit]
        ids = [example.input_ids[np.flatnonzero(example.target[1:]) + 1].tolist() for example in examples]
        tokens = [pieces(view.rows.encoder.tokenizer, response[:TOKENS]) for response in ids]
        lambdas = [f"{lam:.2f}" for lam in plan.lam.tolist()[:TOKENS]]
        rows = zip_longest(*tokens, lambdas, fillvalue="")
        groups = [view.groups[slot.row] if view.groups else "" for slot in unit]
        head = [f"{group} {example.id}" for group, example in zip(groups, examples, strict=True)]
        if lambdas:
            tables.append([[*head, "lambda"], *(list(row) for row in rows)])
    return Section(section.id, section.title, section.text, tables=tables)
