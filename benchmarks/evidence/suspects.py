"""Which signal finds which wrong row: the figures of suspects.md.

    python benchmarks/evidence/suspects.py --data DIR --runs DIR --out FILE

DIR holds the sets of suspects_rows.py, and for each a run as far as its confidence, with the NLL of tokens:

    sftmix confidence --model.path ../shared/models/base-7m --data.train DIR/SET.jsonl --reference.token_nll true
        --reference.checkpoints [0,0.34,1] --training.epochs 3 --training.learning_rate 1e-3
        --training.global_batch_size 32 --out DIR/SET

FILE becomes a table in Markdown: the area under the ROC curve by kind of error, mean and 95% interval over seeds.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from scipy.stats import t as student
from sklearn.ensemble import IsolationForest
from sklearn.metrics import roc_auc_score
from sklearn.metrics.pairwise import paired_cosine_distances

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.evidence.suspects_rows import FILES, SEEDS, SHARES  # noqa: E402
from sftmix.common.tables import read_dynamics  # noqa: E402
from sftmix.components import Correctness, LowVariability, Perplexity  # noqa: E402
from sftmix.tools.suspects.command import WITH_MODEL, WITHOUT_MODEL  # noqa: E402
from sftmix.tools.suspects.signals import (  # noqa: E402
    Echo,
    Ending,
    EndOfTurn,
    HardTokens,
    Mismatch,
    SuspectRows,
    duplicates,
    percentiles,
    weighted,
)
from sftmix.types import Float64  # noqa: E402

KINDS = ("swapped", "cut", "words", "form", "wrong")
TOP = (1, 5, 10)
"""Percent of the rows, the first ones, whose precision is told."""


def signals_of(rows: list[dict], run: Path) -> dict[str, Float64]:
    """Return the score of each row by each signal, larger where it is more suspicious."""
    prompts = [f"{row['instruction']}\n{row['input']}".strip() for row in rows]
    responses = [row["output"] for row in rows]
    dynamics = read_dynamics(run / "confidence" / "dynamics.parquet").of([row["id"] for row in rows])
    words, sentences = (SuspectRows(prompts, responses, dynamics, kind) for kind in ("tfidf", "minilm"))
    none = [None] * len(rows)
    nll = dynamics.nll_sum / np.maximum(dynamics.n_tokens, 1)[:, None]
    shipped = [Mismatch(), Echo(), EndOfTurn(), HardTokens(), Ending()]
    weights = {type(signal).__name__: signal.weight for signal in shipped}
    own = {type(signal).__name__: signal.score(sentences) for signal in shipped}
    by_words = {**own, "Mismatch": Mismatch().score(words)}
    ranks = np.array([percentiles(own[name], none) for name in WITH_MODEL])

    def largest(names, scores):
        return np.max([weighted(percentiles(scores[name], none), weights[name]) for name in names], axis=0)

    forest = IsolationForest(random_state=0, n_estimators=300).fit(ranks.T)
    worst = [np.sort(one[-1])[-max(1, one.shape[1] // 10) :].mean() for one in dynamics.token_nll or ()]
    return {
        "**largest weighted rank (default)**": largest(WITH_MODEL, own),
        "**without a reference**": largest(WITHOUT_MODEL, own),
        "**without a model (TF-IDF)**": largest(WITHOUT_MODEL, by_words),
        "largest rank": ranks.max(0),
        "mean of ranks": ranks.mean(0),
        "isolation forest": -forest.score_samples(ranks.T),
        **own,
        "Mismatch by TF-IDF": by_words["Mismatch"],
        "Perplexity (the paper's)": -Perplexity().estimate(dynamics),
        "Correctness": -Correctness().estimate(dynamics),
        "LowVariability": -LowVariability().estimate(dynamics),
        **{f"NLL, {when}": nll[:, k] for k, when in enumerate(("before training", "after a third", "at the end"))},
        "worst tenth of tokens": np.array(worst),
        "forgetting": np.maximum(nll[:, -1] - nll[:, :-1].min(1), 0),
        "baseline: TF-IDF cosine": paired_cosine_distances(*words.vectors),
        "baseline: sentence cosine": paired_cosine_distances(*sentences.vectors),
        "baseline: near-duplicate": (duplicates(sentences) >= 0) * 1.0,
        "baseline: length": np.array(list(map(len, responses))),
        "baseline: random": np.random.default_rng(0).random(len(rows)),
    }


def figures(rows: list[dict], scores: Float64) -> list[float]:
    """Return the areas by kind, their mean, and the precision among the first rows."""
    truth, known = np.array([row["truth"] for row in rows]), np.array([row.get("known", False) for row in rows])
    areas = []
    for kind in KINDS:
        here = (truth == kind) | ((truth == "clean") & (known == (kind == "wrong")))
        areas.append(roc_auc_score(truth[here] == kind, scores[here]))
    order = np.argsort(-scores, kind="stable")
    firsts = [float((truth[order[: max(1, len(rows) * top // 100)]] != "clean").mean()) for top in TOP]
    return [*areas, float(np.mean(areas)), *firsts]


def table(values: dict[str, list[list[float]]]) -> list[str]:
    """Return lines of Markdown: mean over sets, plus or minus half the 95% interval."""
    heads = [*KINDS, "mean", *(f"first {top}%" for top in TOP)]
    lines = [f"| signal | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for name, of_sets in values.items():
        mean, n = np.mean(of_sets, axis=0), len(of_sets)
        half = (
            student.ppf(0.975, n - 1) * np.std(of_sets, axis=0, ddof=1) / np.sqrt(n) if n > 1 else np.zeros(len(mean))
        )
        cells = (f"{m:.3f} ± {h:.3f}" for m, h in zip(mean, half, strict=True))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("data", "runs", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    given, lines = parser.parse_args(), list[str]()
    for name in FILES:
        for share in SHARES:
            values: dict[str, list[list[float]]] = {}
            sets = [f"{name}-{share}-{seed}" for seed in SEEDS]
            done = [one for one in sets if (given.runs / one / "confidence" / "dynamics.parquet").exists()]
            for one in done:
                rows = [json.loads(line) for line in (given.data / f"{one}.jsonl").read_text().splitlines()]
                for signal, scores in signals_of(rows, given.runs / one).items():
                    values.setdefault(signal, []).append(figures(rows, scores))
            lines += ["", f"## {name}, {share}% wrong: {len(done)} of {len(sets)} seeds", "", *table(values)]
    given.out.write_text("\n".join(lines).strip() + "\n")


if __name__ == "__main__":
    main()
