"""A synthetic instruction set whose truth about confidence is known.

Half of the rows come from deterministic families (a rule gives the one right answer), half from open ones (the
answer is drawn at random, so no model can be sure of it). The responses of both kinds are of similar length, so that
length alone does not tell them apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from sftmix.common.rng import generator

Row = dict[str, str]
Task = Callable[[np.random.Generator], tuple[str, str, str]]

KINDS = {
    "animal": ["cat", "dog", "horse", "fox", "bird", "fish"],
    "food": ["bread", "cheese", "soup", "rice", "apple", "cake"],
    "colour": ["red", "blue", "green", "white", "black", "yellow"],
    "place": ["house", "garden", "river", "street", "forest", "beach"],
}
OPPOSITES = "hot-cold big-small fast-slow old-new happy-sad light-dark hard-soft wet-dry rich-poor loud-quiet"
OPPOSITE = {a: b for pair in OPPOSITES.split() for a, b in (pair.split("-"), pair.split("-")[::-1])}
NOUNS = [noun for nouns in KINDS.values() for noun in nouns]
ADJECTIVES = list(OPPOSITE)
NUMBERS = [str(n) for n in range(12)]
COUNTS = ["zero", "one", "two", "three", "four", "five", "six"]
NAMES = ["Ann", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gus", "Hana", "Ivo", "June", "Karl", "Lena"]

MAX_ROWS = 20_000


def make_rows(*, n: int, seed: int) -> list[Row]:
    """Return n rows {instruction, input, output, family, kind}, half of each kind, in random order.

    No two rows are equal, so no two of a deterministic family have the same prompt: rows held out from this list were
    never seen. The smallest family has 2,640 rows, which limits n to MAX_ROWS.
    """
    if not 0 <= n <= MAX_ROWS:
        raise ValueError(f"n is {n}; allowed: 0 to {MAX_ROWS}")
    families = [list(DETERMINISTIC.items()), list(OPEN.items())]
    rows: list[Row] = []
    seen: set[tuple[str, str, str]] = set()
    for k in range(n):
        kind = k % 2
        name, task = families[kind][(k // 2) % len(families[kind])]
        rng = generator(seed, "quickstart_row", k)
        drawn = task(rng)
        while drawn in seen:
            drawn = task(rng)
        seen.add(drawn)
        row = dict(zip(("instruction", "input", "output"), drawn, strict=True))
        rows.append(row | {"family": name, "kind": ("deterministic", "open")[kind]})
    order = generator(seed, "quickstart_order").permutation(n)
    return [rows[k] for k in order.tolist()]


def _draw(rng: np.random.Generator, items: Sequence[str], low: int = 2, high: int = 5) -> list[str]:
    """Return low to high different items, in random order."""
    return [items[k] for k in rng.permutation(len(items))[: rng.integers(low, high + 1)].tolist()]


def _say(rng: np.random.Generator, *phrasings: str) -> str:
    return phrasings[rng.integers(len(phrasings))]


def _words(words: Sequence[str]) -> str:
    return "Words: " + " ".join(words)


def _mapped(items: Sequence[str], length: int, rule: Callable[[Sequence[str]], Sequence[str]], *phrasings: str) -> Task:
    """Return a family of tasks that turn a list of words into another by a rule.

    The list has a fixed length: a small model learns to look a fixed distance back within a minute, not to align lists.
    """

    def task(rng: np.random.Generator) -> tuple[str, str, str]:
        words = _draw(rng, items, length, length)
        return _say(rng, *phrasings), _words(words), " ".join(rule(words))

    return task


def _count(rng: np.random.Generator) -> tuple[str, str, str]:
    words = _draw(rng, NOUNS, 2, 6)
    return _say(rng, "How many words are there?", "Count the words."), _words(words), f"There are {COUNTS[len(words)]}."


def _pick(rng: np.random.Generator) -> tuple[str, str, str]:
    kind, items = [*KINDS.items(), ("name", NAMES)][rng.integers(len(KINDS) + 1)]
    return _say(rng, f"Pick any {kind} you like.", f"Give me some {kind} ideas."), "", " ".join(_draw(rng, items))


def _guess(rng: np.random.Generator) -> tuple[str, str, str]:
    return _say(rng, "Guess my numbers.", "Throw some dice for me."), "", " ".join(_draw(rng, NUMBERS))


def _associate(rng: np.random.Generator) -> tuple[str, str, str]:
    prompt = _say(rng, "What comes to mind?", "Think of other words.")
    return prompt, _words(_draw(rng, NOUNS)), " ".join(_draw(rng, NOUNS + ADJECTIVES))


def _describe(rng: np.random.Generator) -> tuple[str, str, str]:
    noun = _draw(rng, NOUNS, 1, 1)[0]
    adjectives = " ".join(_draw(rng, ADJECTIVES, 1, 4))
    return _say(rng, f"Describe the {noun}.", f"What is the {noun} like?"), "", f"{adjectives} {noun}"


def _mishear(rng: np.random.Generator) -> tuple[str, str, str]:
    words = _draw(rng, NOUNS)
    heard = [word if rng.random() < 0.4 else NOUNS[rng.integers(len(NOUNS))] for word in words]
    return _say(rng, "Repeat the words, but mishear some.", "Say this wrongly."), _words(words), " ".join(heard)


def _invite(rng: np.random.Generator) -> tuple[str, str, str]:
    return _say(rng, "Whom shall we invite?", "Make a list of guests."), "", " ".join(_draw(rng, NAMES))


_KIND_OF = {noun: kind for kind, nouns in KINDS.items() for noun in nouns}

DETERMINISTIC: dict[str, Task] = {
    "repeat": _mapped(NOUNS, 4, lambda words: words, "Repeat the words.", "Say this again."),
    "reverse": _mapped(NOUNS, 3, lambda words: words[::-1], "Reverse the order.", "Say this backwards."),
    "capitals": _mapped(NOUNS, 3, lambda words: [w.upper() for w in words], "Write in capitals.", "Shout the words."),
    "opposites": _mapped(
        ADJECTIVES, 4, lambda words: [OPPOSITE[w] for w in words], "Give the opposites.", "Negate this."
    ),
    "kinds": _mapped(NOUNS, 5, lambda words: [_KIND_OF[w] for w in words], "What kind is each?", "Sort into kinds."),
    "initials": _mapped(
        NOUNS, 4, lambda words: [w[0] for w in words], "Give the first letters.", "Write the initials."
    ),
    "successors": _mapped(NUMBERS, 3, lambda words: [str(int(w) + 1) for w in words], "Add one to each.", "Count on."),
    "count": _count,
}
OPEN: dict[str, Task] = {
    "pick": _pick,
    "guess": _guess,
    "associate": _associate,
    "describe": _describe,
    "mishear": _mishear,
    "invite": _invite,
}
