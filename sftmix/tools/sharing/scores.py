"""The scores of a data set without its text, as files: dynamics, confidence, and the hash of each row's text."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from sftmix.common.errors import ConfigError
from sftmix.common.files import write_text
from sftmix.common.tables import read_confidence, read_dynamics, write_confidence, write_dynamics, write_table
from sftmix.pipeline.rows import rows_of_run
from sftmix.tools.sharing.cards import CARD, scores_card


def write_scores(run: Path, to: Path, *, name: str, license: str | None = None) -> None:
    """Write dynamics.parquet, confidence.parquet, rows.parquet and the card into `to`.

    name  of the repository on the hub, for the card
    The NLL of single tokens is left out: it tells too much of a text. Raises ConfigError for a run without scores.
    """
    folder = run / "confidence"
    if not (folder / "confidence.parquet").exists() or not (folder / "dynamics.parquet").exists():
        raise ConfigError(f"{run} has no confidence of its rows yet: sftmix confidence --config {run / 'config.yaml'}")
    rows = rows_of_run(run)[1].data.train
    dynamics = replace(read_dynamics(folder / "dynamics.parquet"), token_nll=None)
    to.mkdir(parents=True, exist_ok=True)
    write_dynamics(to / "dynamics.parquet", dynamics)
    write_confidence(to / "confidence.parquet", *read_confidence(folder / "confidence.parquet"))
    write_table(to / "rows.parquet", rows.ids, hash=rows.content_hashes())
    alone = dynamics.alone_nll_sum is not None
    write_text(to / CARD, scores_card(run, rows=len(rows.ids), alone=alone, name=name, license=license))
