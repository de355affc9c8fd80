"""A callback that writes which examples each step mixes, to copy: `--callbacks+ watch_pairs.WatchPairs`."""

import json

from sftmix.components import Callback, StageState


def mixed(hidden, head, batch, plan):
    """Pairs of ids, and the λ of each of their token pairs, which belongs to the first."""
    slots = batch.slot[plan.pairs].tolist()
    lams = plan.lam.tolist()
    return [(batch.ids[a], batch.ids[b], lam) for (a, b), lam in zip(slots, lams, strict=True)]


class WatchPairs(Callback):
    """pairs.jsonl in the stage's directory: a line for each step."""

    gives = frozenset()

    def on_step_end(self, state: StageState) -> None:
        if state.read is None:
            return
        found = {pair for part in state.read(mixed) for pair in part}  # on every rank: it is collective
        if state.is_main and state.directory is not None:
            with open(state.directory / "pairs.jsonl", "a") as file:
                file.write(json.dumps({"step": state.step, "pairs": sorted(found)}) + "\n")
