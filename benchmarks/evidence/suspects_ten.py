"""Ten kinds of errors at three rates, in rows on which nothing was chosen: the default orders beside other measures.

    python benchmarks/evidence/suspects_ten.py rows --out DIR/ten.jsonl
    sftmix confidence --model.path MODEL --data.train DIR/ten.jsonl --reference FromCheckpoints \\
        --reference.paths '[MODEL]' --reference.token_nll true --reference.response_alone true --out DIR/ten
    python benchmarks/evidence/suspects_ten.py table --rows DIR/ten.jsonl [--run DIR/ten]

`alpaca` has 400 rows of alpaca_17k.jsonl that alpaca_8k.json and suspects_planted.py lack, `medquad` 200 rows that
suspects_planted.py lacks. A twentieth, a tenth and a fifth of them are wrong, in ten ways in turns; the fewer wrong
rows are among the more. The hits are those among as many first rows as there are wrong ones, the areas those under the
ROC curve of one kind of wrong rows, of a fifth, and all right ones.

Said before any row was drawn: all limits, lists of words and thresholds of sftmix/tools/suspects are as the commit has
them that adds this file. They were chosen on the first 1,500 rows of alpaca_8k.json, with the errors below planted in
400 of them. The texts below are by the hand that wrote the rules; some are in words, languages and encodings that no
rule knows. The default order with the sentence embedding and SmolLM2-135M is to find 33 of 40 wrong rows of Alpaca; the
other figures have no mark to reach.
"""

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from sklearn.metrics import roc_auc_score
from sklearn.metrics.pairwise import paired_cosine_distances

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.evidence.suspects import plain_rules, read_lines, self_confidence, texts_of  # noqa: E402
from benchmarks.evidence.suspects_planted import SIZES, pools  # noqa: E402
from benchmarks.evidence.suspects_rows import cut, swapped, words  # noqa: E402
from sftmix.disk.tables import read_dynamics  # noqa: E402
from sftmix.tools.quickstart import Row, write_jsonl  # noqa: E402
from sftmix.tools.suspects.rows import SuspectRows  # noqa: E402
from sftmix.tools.suspects.signals import Mismatch, ranked  # noqa: E402
from sftmix.tools.suspects.table import OF_TEXTS, SHIPPED, default_signals, kinds_of  # noqa: E402
from sftmix.types import Float64, TrainingDynamics  # noqa: E402

RATES = (5, 10, 20)
REFUSALS = (
    "I apologize, but I'm not able to help you with this task.",
    "Sorry, I don't have access to the information that is needed here.",
    "As a large language model I do not have personal opinions or feelings.",
    "This request goes against my guidelines, so I have to decline.",
    "I'm afraid I can't do that.",
    "Unfortunately, I am unable to provide a response to this question.",
    "That is not something I'm able to discuss.",
    "My apologies, but I cannot complete this request at the moment.",
)
PLACEHOLDERS = ("N/A", "...", "None.", "[no answer]", "TODO: write this", "-", "(left blank)", "null")
OTHERS = (
    "Questa domanda non ha una risposta semplice, perché dipende da molti fattori che si devono considerare insieme.",
    "Esta pergunta não tem uma resposta simples, pois depende de muitos fatores que devem ser considerados.",
    "Op deze vraag is niet één antwoord te geven, omdat het van veel omstandigheden afhangt.",
    "Cette question est intéressante, mais il faudrait avoir plus de détails pour y répondre correctement.",
    "Diese Aufgabe lässt sich auf mehrere Arten lösen, und welche davon die beste ist, hängt vom Ziel ab.",
    "To pytanie nie ma prostej odpowiedzi, ponieważ zależy od wielu czynników.",
    "На этот вопрос нет простого ответа, потому что всё зависит от обстоятельств.",
    "这个问题没有简单的答案，因为它取决于许多因素。",
)


def refused(rows: list[Row], chosen: list[int], rng: np.random.Generator) -> list[str]:
    return [REFUSALS[k] for k in _some(REFUSALS, chosen, rng)]


def emptied(rows: list[Row], chosen: list[int], rng: np.random.Generator) -> list[str]:
    return [PLACEHOLDERS[k] for k in _some(PLACEHOLDERS, chosen, rng)]


def in_another_language(rows: list[Row], chosen: list[int], rng: np.random.Generator) -> list[str]:
    return [OTHERS[k] for k in _some(OTHERS, chosen, rng)]


def _some(texts: tuple[str, ...], chosen: list[int], rng: np.random.Generator) -> list[int]:
    return [k % len(texts) for k in np.resize(rng.permutation(len(texts)), len(chosen)).tolist()]


def repeated_prompts(rows: list[Row], chosen: list[int], rng: np.random.Generator) -> list[str]:
    return [f"{rows[k]['instruction']} {rows[k]['input']}".strip() for k in chosen]


def misread(rows: list[Row], chosen: list[int], rng: np.random.Generator) -> list[str]:
    """Return responses with typographic marks that were written in UTF-8 and read in another encoding, or lost."""
    made = []
    for k in chosen:
        text = rows[k]["output"].replace("'", "’").replace(" - ", " – ")
        text = re.sub(r'"([^"]*)"', "“\\1”", text)
        how = ("cp1252", "latin-1", "mac_roman", "lost")[rng.integers(4)]
        data = text.encode()
        made.append(data.decode("ascii", "replace") if how == "lost" else data.decode(how, "replace"))
    return made


def altered(rows: list[Row], chosen: list[int], rng: np.random.Generator) -> list[str]:
    """Return responses with another digit in one of their numbers of two digits and more."""
    made = []
    for k in chosen:
        text = rows[k]["output"]
        found = [*re.finditer(r"\d{2,}", text)]
        start, stop = found[rng.integers(len(found))].span()
        place = int(rng.integers(start + 1, stop))
        made.append(text[:place] + str((int(text[place]) + int(rng.integers(1, 10))) % 10) + text[place + 1 :])
    return made


def asked_again(rows: list[Row], chosen: list[int], rng: np.random.Generator) -> list[Row]:
    """Return the questions of other rows in slightly other words, with the answer to the next like question."""
    bags = [{*re.findall(r"\w+", f"{row['instruction']} {row['input']}".lower())} for row in rows]
    made = []
    for _ in chosen:
        other = int(rng.integers(len(rows)))
        while other in chosen or len(bags[other]) < 5:
            other = int(rng.integers(len(rows)))
        like = [len(bags[other] & bag) / len(bags[other] | bag) * (j != other) for j, bag in enumerate(bags)]
        said = rows[other]["instruction"].rstrip(".?! ")
        said = (f"Please {said[:1].lower()}{said[1:]}.", said.lower(), f"{said}, please.")[rng.integers(3)]
        made.append({**rows[other], "instruction": said, "output": rows[int(np.argmax(like))]["output"]})
    return made


KINDS: dict[str, tuple[Callable[..., list], str]] = {
    "numbers": (altered, r"\d{2,}"),
    "encoding": (misread, r"['\"]"),
    "swapped": (swapped, ""),
    "cut": (cut, r"(\S+\s+){8}"),
    "words": (words, r"(\S+\s+){8}"),
    "refusal": (refused, ""),
    "echo": (repeated_prompts, ""),
    "language": (in_another_language, ""),
    "empty": (emptied, ""),
    "repeat": (asked_again, ""),
}
"""Each kind, and a pattern that a response has which is made wrong in this way."""


def make_rows() -> list[Row]:
    """Return each row as it is, and the wrong rows of a fifth, with ids SET/KIND/PLACE/NUMBER of the kind."""
    made = []
    for name, pool in pools().items():
        seed = len({"alpaca": "alpaca17k"}.get(name, name))
        used = SIZES[name]
        left = np.random.default_rng([71, seed]).permutation(len(pool))[used:]
        rng = np.random.default_rng([1130, seed])
        rows = [pool[k] for k in rng.permutation(left)[:used]]
        made += [{"id": f"{name}/clean/{k:03}/0", **row} for k, row in enumerate(rows)]
        free = rng.permutation(used).tolist()
        for kind, (corrupt, pattern) in KINDS.items():
            chosen = [k for k in free if re.search(pattern, rows[k]["output"])][: used // 50]
            free = [k for k in free if k not in chosen]
            for number, (k, new) in enumerate(zip(chosen, corrupt(rows, chosen, rng), strict=True)):
                changed = new if isinstance(new, dict) else {**rows[k], "output": new}
                made.append({"id": f"{name}/{kind}/{k:03}/{number}", **changed})
    return made


def orders(rows: list[Row], dynamics: TrainingDynamics | None) -> dict[str, Float64]:
    """Return the score of each row by each order, larger if it is more suspicious."""
    prompts, responses = texts_of(rows)
    words, sentences = (SuspectRows(prompts, responses, dynamics, kind) for kind in ("tfidf", "minilm"))

    def default(texts: SuspectRows, names: tuple[str, ...] | None = None) -> Float64:
        kinds = kinds_of(names or default_signals(texts))
        return ranked(texts, kinds, [""] * len(rows))[1].max(axis=1).to_numpy()

    found = {
        "**texts alone, sentence embedding**": default(sentences, OF_TEXTS),
        "**texts alone, words**": default(words, OF_TEXTS),
        "`Mismatch` alone, sentence embedding": Mismatch().score(sentences),
        "MiniLM alone: cosine of prompt and response": paired_cosine_distances(*sentences.vectors),
        **{f"rule by hand: {name[10:]}": scores for name, scores in plain_rules(prompts, responses).items()},
    }
    if dynamics is None:
        return found
    first = {"**default**": default(sentences), "**default, words**": default(words)}
    return {**first, **found, **self_confidence(dynamics)}


def lines_of(rows: list[Row], dynamics: TrainingDynamics | None) -> list[str]:
    """Return lines of Markdown: hits of each order at each rate, and the area of each signal for each kind."""
    lines, places = list[str](), [row["id"].split("/") for row in rows]
    sets = {p[0] for p in places}
    for name, size in SIZES.items():
        if name not in sets:  # a file of one of the two, as half of the scoring
            continue
        hits, kinds_hit, areas = dict[str, list[str]](), dict[str, list[str]](), dict[str, list[str]]()
        for rate in RATES:
            limit = size * rate // 1000  # of each kind
            wrong = {p[2]: k for k, p in enumerate(places) if p[0] == name and p[1] != "clean" and int(p[3]) < limit}
            clean = [k for k, p in enumerate(places) if p[:2] == [name, "clean"] and p[2] not in wrong]
            chosen = sorted([*wrong.values(), *clean], key=lambda k: places[k][2])
            some = [rows[k] for k in chosen]
            own = None if dynamics is None else dynamics.of([row["id"] for row in some])
            truth = np.array([places[k][1] for k in chosen])
            for order, scores in orders(some, own).items():
                first = np.argsort(-np.nan_to_num(scores, nan=-np.inf), kind="stable")[: len(wrong)]
                hits.setdefault(order, []).append(f"{(truth[first] != 'clean').sum()}")
                if rate == 10:
                    kinds_hit[order] = [str((truth[first] == kind).sum()) for kind in KINDS]
        prompts, responses = texts_of(some)
        texts = SuspectRows(prompts, responses, own, "minilm")
        for signal in SHIPPED[: None if own is not None else len(OF_TEXTS)]:
            scores = signal().score(texts)
            scores = np.where(np.isnan(scores), np.nanmin(scores) - 1, scores)
            of = [np.isin(truth, ["clean", kind]) for kind in KINDS]
            areas[f"`{signal.__name__}`"] = [
                f"{roc_auc_score(truth[at] == kind, scores[at]):.2f}" for at, kind in zip(of, KINDS, strict=True)
            ]
        numbers = [f"of {size * rate // 100}" for rate in RATES]
        lines += [f"## {name}, hits", *_table(["order", *numbers], hits)]
        lines += [f"## {name}, hits of {size // 100} of each kind at 10%", *_table(["order", *KINDS], kinds_hit)]
        lines += [f"## {name}, areas", *_table(["signal", *KINDS], areas)]
    return lines


def _table(heads: list[str], cells: dict[str, list[str]]) -> list[str]:
    head = [f"| {' | '.join(heads)} |", "|---" + "|---:" * (len(heads) - 1) + "|"]
    return ["", *head, *(f"| {name} | {' | '.join(of)} |" for name, of in cells.items()), ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("rows").add_argument("--out", type=Path, required=True)
    table = commands.add_parser("table")
    table.add_argument("--rows", type=Path, required=True)
    table.add_argument("--run", type=Path)
    given = parser.parse_args()
    if given.command == "rows":
        write_jsonl(given.out, make_rows())
    else:
        file = given.run and given.run / "confidence" / "dynamics.parquet"
        print("\n".join(lines_of(read_lines(given.rows), read_dynamics(file) if file else None)))


if __name__ == "__main__":
    main()
