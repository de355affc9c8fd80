"""Which signal finds which wrong row: the figures of suspects.md, with a model that was not trained, or a run.

    python benchmarks/evidence/suspects_rows.py --out DIR/data
    sftmix suspects DIR/data/all.jsonl --model MODEL --out DIR/MODEL --top 1
    python benchmarks/evidence/suspects.py --data DIR/data --runs DIR/MODEL/scores --out table.md

all.jsonl has each text of the thirty sets once. DIR may also hold a run for each set, with the set's name, such as one
of a reference that was trained on it: --runs DIR/trained. Sets that are not in DIR/data are left out. The table has,
for each signal and kind of error, the area under the ROC curve, and the share of wrong rows among the first 1%, 5% and
10%: mean and 95% interval over seeds.
"""

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from scipy.stats import t as student
from sklearn.metrics import roc_auc_score
from sklearn.metrics.pairwise import paired_cosine_distances

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.evidence.suspects_rows import FILES, SEEDS, SHARES, key_of  # noqa: E402
from sftmix.components.others import confidences  # noqa: E402
from sftmix.disk.tables import read_dynamics  # noqa: E402
from sftmix.tools.suspects.rows import SuspectRows  # noqa: E402
from sftmix.tools.suspects.signals import (  # noqa: E402
    Echo,
    EndOfTurn,
    HardTokens,
    Information,
    Mismatch,
    Perplexity,
    Signal,
    ranked,
)
from sftmix.tools.suspects.table import OF_TEXTS, default_signals, kinds_of  # noqa: E402
from sftmix.types import Float64, TrainingDynamics  # noqa: E402

KINDS = ("swapped", "cut", "words", "form", "wrong")
TOP = (1, 5, 10)
"""Percent of the rows, the first ones, whose share of wrong rows is reported."""
REFUSAL = re.compile(r"\b(sorry|cannot|can't|unable to|as an ai|language model)\b", re.IGNORECASE)
COMMON = frozenset(
    re.findall(r"\w+", "the of and to a in is that it for as was with be by on are this i you an or at from not")
)
"""Common English words; a text without them is in another language, or a list."""


class Ending(Signal):
    """1 for a response that ends without a mark, as one that was cut off does; for rows without a reference."""

    def score(self, rows: SuspectRows) -> Float64:
        return np.array([bool(re.search(r"[\w,-]$", response.rstrip())) for response in rows.responses], np.float64)


class IFD(Signal):
    """The same as a ratio, NLL with the prompt / NLL without (arXiv 2308.12032): short responses count as long ones."""

    def score(self, rows: SuspectRows) -> Float64:
        return -confidences.IFD(checkpoint="last").estimate(rows.dynamics_with("alone_nll_sum"))


SIGNALS = (Mismatch, Information, IFD, Echo, EndOfTurn, HardTokens, Ending, Perplexity)


def texts_of(rows: list[dict]) -> tuple[list[str], list[str]]:
    """Return prompts and responses."""
    return [f"{row['instruction']}\n{row['input']}".strip() for row in rows], [row["output"] for row in rows]


def sentence_vectors(sets: dict[str, list[dict]]) -> dict[str, np.ndarray]:
    """Return the sentence embedding of each text; a text is in several sets and is embedded once."""
    texts = sorted({text for rows in sets.values() for side in texts_of(rows) for text in side})
    half = len(texts) // 2 + 1  # as many of each side; one or two are on both
    first, last = texts[:half], texts[-half:]
    return dict(zip([*first, *last], np.concatenate(SuspectRows(first, last, None, "minilm").vectors), strict=True))


def signals_of(rows: list[dict], dynamics: TrainingDynamics, vectors: dict[str, np.ndarray]) -> dict[str, Float64]:
    """Return the score of each row by each signal and by the defaults, larger where it is more suspicious."""
    prompts, responses = texts_of(rows)
    words, sentences = (SuspectRows(prompts, responses, dynamics, kind) for kind in ("tfidf", "minilm"))
    sentences.vectors = [np.array([vectors[text] for text in side]) for side in (prompts, responses)]
    alone = dynamics.alone_nll_sum is not None
    kinds = [kind for kind in SIGNALS if alone or kind not in (Information, IFD)]
    own = {kind.__name__: kind().score(sentences) for kind in kinds}

    def order(names: Sequence[str], texts: SuspectRows) -> Float64:
        return ranked(texts, kinds_of(names), [""] * len(rows))[1].max(axis=1).to_numpy()

    return {
        "**default**": order(default_signals(sentences), sentences),
        "**default, without the sentence embedding**": order(default_signals(words), words),
        "**without a model**": order(OF_TEXTS, sentences),
        "**without a model or the embedding**": order(OF_TEXTS, words),
        **own,
        **_parts_of(dynamics),
        "baseline: sentence cosine": paired_cosine_distances(*sentences.vectors),
        "baseline: TF-IDF cosine": paired_cosine_distances(*words.vectors),
        **plain_rules(prompts, responses),
        **self_confidence(dynamics),
    }


def plain_rules(prompts: list[str], responses: list[str]) -> dict[str, Float64]:
    """Return what three rules say of the rows that need no model: 1 or 0, but for the share of word pairs.

    form   a refusal, the prompt again, or fewer than one in twelve of at least eight words is a common English one
    cut    no mark at the end (`Ending`)
    words  the share of a response's pairs of neighbouring words that no other row has
    """
    pairs = [{*pairwise(re.findall(r"\w+", text.lower()))} for text in responses]
    known = Counter(pair for of_row in pairs for pair in of_row)
    alone = [sum(known[pair] == 1 for pair in of_row) / max(1, len(of_row)) for of_row in pairs]
    form = [
        bool(REFUSAL.search(said)) or said.strip() == " ".join(asked.split("\n")).strip() or _foreign(said)
        for asked, said in zip(prompts, responses, strict=True)
    ]
    return {
        "baseline: refusals, repeated prompts and language": np.array(form, np.float64),
        "baseline: no mark at the end": Ending().score(SuspectRows(prompts, responses)),
        "baseline: pairs of words that no other row has": np.array(alone),
    }


def _foreign(text: str) -> bool:
    words = re.findall(r"\w+", text.lower())
    return len(words) >= 8 and sum(word in COMMON for word in words) < len(words) / 12


def self_confidence(dynamics: TrainingDynamics) -> dict[str, Float64]:
    """Return cleanlab's score of a label, its probability under the model, taken over a response's tokens."""
    if dynamics.token_nll is None:
        return {}
    nll = [of_row[-1].astype(np.float64) for of_row in dynamics.token_nll]
    mean = [1 - np.exp(-one).mean() if len(one) else np.nan for one in nll]
    least = [1 - np.exp(-one.max()) if len(one) else np.nan for one in nll]
    return {
        "baseline: self-confidence (cleanlab), mean of the tokens": np.array(mean),
        "baseline: self-confidence (cleanlab), least token": np.array(least),
    }


def _parts_of(dynamics: TrainingDynamics) -> dict[str, Float64]:
    """Return tries with the NLL of tokens, with the prompt minus without."""
    if dynamics.token_nll is None or dynamics.alone_token_nll is None:
        return {}
    each = [
        (nll[-1] - alone[-1]).astype(np.float64)
        for nll, alone in zip(dynamics.token_nll, dynamics.alone_token_nll, strict=True)
    ]

    def of(measure: Callable[[Float64], float]) -> Float64:
        return np.array([measure(one) if len(one) else np.nan for one in each])

    return {
        "Information a token": of(np.mean),
        "Information, first eight tokens": of(lambda one: one[:8].sum()),
        "Information, hardest fifth of tokens": of(lambda one: np.sort(one)[-max(1, len(one) // 5) :].mean()),
        "Information, hardest token": of(np.max),
    }


def figures(rows: list[dict], scores: Float64) -> list[float]:
    """Return the areas by kind, their mean, and the share of wrong rows among the first rows."""
    truth, known = np.array([row["truth"] for row in rows]), np.array([row.get("known", False) for row in rows])
    scores = np.where(np.isnan(scores), -np.inf, scores)
    areas = []
    for kind in KINDS:
        here = (truth == kind) | ((truth == "clean") & (known == (kind == "wrong")))
        areas.append(roc_auc_score(truth[here] == kind, np.maximum(scores[here], -1e9)))
    order = np.argsort(-scores, kind="stable")
    firsts = [float((truth[order[: max(1, len(rows) * top // 100)]] != "clean").mean()) for top in TOP]
    return [*areas, float(np.mean(areas)), *firsts]


def table(values: dict[str, list[list[float]]]) -> list[str]:
    """Return lines of Markdown: mean over sets, plus or minus half the 95% interval."""
    heads = [*KINDS, "mean", *(f"first {top}%" for top in TOP)]
    lines = [f"| signal | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for name, of_sets in values.items():
        mean, n = np.mean(of_sets, axis=0), len(of_sets)
        half = student.ppf(0.975, n - 1) * np.std(of_sets, axis=0, ddof=1) / np.sqrt(n) if n > 1 else 0 * mean
        cells = (f"{m:.3f} ± {h:.3f}" if n > 1 else f"{m:.3f}" for m, h in zip(mean, half, strict=True))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("data", "runs", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    given, lines = parser.parse_args(), list[str]()
    file = Path("confidence") / "dynamics.parquet"
    whole = read_dynamics(given.runs / file) if (given.runs / file).exists() else None
    cells = [[f"{name}-{share}-{seed}" for seed in SEEDS] for name in FILES for share in SHARES]
    there = {path.stem for path in given.data.glob("*.jsonl")}
    done = [[one for one in sets if one in there and (whole or (given.runs / one / file).exists())] for sets in cells]
    rows_of = {one: read_lines(given.data / f"{one}.jsonl") for sets in done for one in sets}
    vectors = sentence_vectors(rows_of)
    for sets in filter(None, done):
        values: dict[str, list[list[float]]] = {}
        for one in sets:
            rows = rows_of[one]
            found = whole.of([key_of(row) for row in rows]) if whole else None
            dynamics = found or read_dynamics(given.runs / one / file).of([row["id"] for row in rows])
            for signal, scores in signals_of(rows, dynamics, vectors).items():
                values.setdefault(signal, []).append(figures(rows, scores))
        name, share, _ = sets[0].split("-")
        lines += ["", f"## {name}, {share}% wrong: {len(sets)} of {len(SEEDS)} seeds", "", *table(values)]
    given.out.write_text("\n".join(lines).strip() + "\n")


if __name__ == "__main__":
    main()
