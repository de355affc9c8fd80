"""Make sets of rows with five kinds of errors, for the study of suspects (suspects.md).

    python benchmarks/evidence/suspects_rows.py --out runs/suspects/data

It writes SET-SHARE-SEED.jsonl: real rows of Alpaca or ChatDoctor, and rows of known truth (those of the quickstart).
`truth` of a row is clean, or the kind of its error. A share of the real rows is corrupted, a quarter of it in each of
four ways, and the same share of the rows of known truth is wrong. all.jsonl has every text of the sets once, with ids
of its own, so that a model scores it once.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.evidence.known_rows import corrupted, named  # noqa: E402
from sftmix.disk.hashes import sha256_json  # noqa: E402
from sftmix.ranks.rng import generator  # noqa: E402
from sftmix.tools.quickstart import (  # noqa: E402
    Row,
    make_rows,
    write_jsonl,
)

SHARED = ROOT.parent / "shared" / "data"
FILES = {"alpaca": SHARED / "alpaca" / "alpaca_8k.json", "chatdoctor": SHARED / "medical" / "chatdoctor5k.json"}
SHARES, SEEDS = (5, 10, 30), (1, 2, 3, 4, 5)
REAL, KNOWN = 400, 80
"""Rows of each set: real ones, and rows of known truth."""
REFUSALS = (
    "I'm sorry, but I cannot help with that.",
    "As an AI language model, I am unable to answer this question.",
    "I'm sorry, I can't assist with that request.",
    "I cannot fulfil this request.",
)
FOREIGN = (
    "Voici une réponse à votre question. Il est important de bien comprendre le sujet avant de prendre une décision.",
    "Je vous remercie pour votre question. La réponse dépend de plusieurs facteurs que nous allons examiner ensemble.",
    "Il existe plusieurs solutions possibles, et chacune présente des avantages et des inconvénients.",
    "Das ist eine gute Frage. Es gibt mehrere Möglichkeiten, dieses Problem zu lösen.",
    "Bitte beachten Sie, dass die Antwort von vielen Umständen abhängt.",
    "La respuesta depende de muchos factores, y conviene analizarlos con calma antes de decidir.",
)


def real_rows(name: str) -> list[Row]:
    """Return the rows of a set that are not too long, with the fields instruction, input and output."""
    rows = json.loads(FILES[name].read_text())
    if name == "chatdoctor":  # one instruction stands in all rows
        rows = [{"instruction": row["input"], "input": "", "output": row["output"]} for row in rows]
    fits = [row for row in rows if row["output"].strip() and len(row["output"]) < 2500]
    return [row for row in fits if len(row["instruction"] + row["input"]) < 2000]


def swapped(rows: list[Row], chosen: list[int], rng: np.random.Generator) -> list[str]:
    """Return the response of another of the chosen rows."""
    outputs = [rows[k]["output"] for k in chosen]
    return outputs[1:] + outputs[:1]


def cut(rows: list[Row], chosen: list[int], rng: np.random.Generator) -> list[str]:
    """Return the responses without their last 20 to 70 percent of words."""
    words = [rows[k]["output"].split(" ") for k in chosen]
    return [" ".join(one[: max(1, int(len(one) * rng.uniform(0.3, 0.8)))]) for one in words]


def words(rows: list[Row], chosen: list[int], rng: np.random.Generator) -> list[str]:
    """Return the responses with half of their words of four letters and more exchanged for others of the set."""
    pool = re.findall(r"[A-Za-z]{4,}", " ".join(row["output"] for row in rows))

    def other(found: re.Match[str]) -> str:
        return pool[rng.integers(len(pool))] if rng.random() < 0.5 else found.group()

    return [re.sub(r"[A-Za-z]{4,}", other, rows[k]["output"]) for k in chosen]


def form(rows: list[Row], chosen: list[int], rng: np.random.Generator) -> list[str]:
    """Return refusals, prompts in the place of their answers, and sentences in another language, in turns."""
    made = []
    for turn, k in enumerate(chosen):
        prompt = f"{rows[k]['instruction']} {rows[k]['input']}".strip()
        foreign = " ".join(FOREIGN[j] for j in rng.permutation(len(FOREIGN))[: rng.integers(1, 3)])
        made.append((REFUSALS[rng.integers(len(REFUSALS))], prompt, foreign)[turn % 3])
    return made


KINDS: dict[str, Callable[[list[Row], list[int], np.random.Generator], list[str]]] = {
    "swapped": swapped,
    "cut": cut,
    "words": words,
    "form": form,
}


def make_set(name: str, share: int, seed: int) -> list[Row]:
    """Return a set of rows with ids and `truth`; what is drawn depends on the set, the share (percent) and the seed."""
    rng = generator(seed, "suspects", name, share)
    pool = real_rows(name)
    rows = [pool[k] | {"truth": "clean"} for k in rng.permutation(len(pool))[:REAL]]
    long = [k for k in range(REAL) if len(rows[k]["output"].split()) >= 8]
    each = round(REAL * share / 400)
    order = rng.permutation(long).tolist()
    for number, (kind, corrupt) in enumerate(KINDS.items()):
        chosen = order[number * each : (number + 1) * each]
        for k, output in zip(chosen, corrupt(rows, chosen, rng), strict=True):
            rows[k] = rows[k] | {"output": output, "truth": kind}
    known = [row for row in named(make_rows(n=4 * KNOWN, seed=1000 + seed), "known") if row["truth"] == "clean"]
    wrong = corrupted(known[:KNOWN], share, seed=seed)
    fields = ("instruction", "input", "output")
    truths = {"corrupted": "wrong", "clean": "clean"}
    rows += [{f: row[f] for f in fields} | {"truth": truths[row["truth"]], "known": True} for row in wrong]
    shuffled = [rows[k] for k in rng.permutation(len(rows))]
    return [{"id": f"{k:04}"} | row for k, row in enumerate(shuffled)]


def key_of(row: Row) -> str:
    """Return the id of a row's text in all.jsonl."""
    return sha256_json([row[field] for field in ("instruction", "input", "output")])[:16]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the rows")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    every: dict[str, Row] = {}
    for name in FILES:
        for share in SHARES:
            for seed in SEEDS:
                rows = make_set(name, share, seed)
                write_jsonl(out / f"{name}-{share}-{seed}.jsonl", rows)
                texts = [{field: row[field] for field in ("instruction", "input", "output")} for row in rows]
                every |= {key_of(row): {"id": key_of(row)} | row for row in texts}
    write_jsonl(out / "all.jsonl", list(every.values()))


if __name__ == "__main__":
    main()
