"""Rows that somebody decided to leave out: a list of names, or a table with a column to fill in."""

import csv
import io
from collections.abc import Callable, Iterable, Mapping, Sequence, Set

from sftmix.disk.places import PathLike, place_of
from sftmix.disk.texts import text_of
from sftmix.words.errors import ConfigError
from sftmix.words.fields import RESERVED_ID
from sftmix.words.shown import counted, of_cell, quoted

DROP = "drop"
DECISIONS = ("", "keep", DROP, "mended")
"""What the column `decision` may hold. Only drop leaves a row out; mended: it was corrected in its file."""


OF_A_ROW = {"id", "source", "decision"}
"""Columns that a table has."""
TEXTS = {"prompt", "response"}
"""Columns that a table of `suspects` has as well."""


def read_decisions(text: str, path: PathLike) -> list[dict[str, str]]:
    """Return the lines of a table with commas, semicolons or tabs between columns, as cells by the column.

    A file without id, source and decision has none. Raises ConfigError for a word that is no decision.
    """
    head = text.partition("\n")[0]
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))  # a response may be longer than 128 KiB
    table = csv.DictReader(io.StringIO(text), delimiter=max(",;\t", key=head.count))
    if not OF_A_ROW.issubset(table.fieldnames or ()):
        return []
    lines = []
    for cells in table:
        line = {name: of_cell(cell or "") for name, cell in cells.items() if name}  # without what is beyond the head
        word = line["decision"] = line["decision"].strip().lower()
        if word not in DECISIONS:
            raise ConfigError(
                f"{path}: the decision on {line['id']} ({line['source']}) is {quoted(word)}; allowed: {DECISIONS}"
            )
        lines.append(line)
    return lines


def in_words(*texts: str) -> list[str]:
    """Return the words of texts, by which a row is known: a CSV may have other line ends."""
    return " ".join(texts).split()


def left_out_with(decisions: Iterable[tuple[str, str]]) -> str:
    """Return what is to be said of answers that are left out as another of their conversation is; "" if none are.

    decisions  id and decision of each answer of a table: c1@turn0, drop
    """
    of_rows = [(RESERVED_ID.sub("", name), word) for name, word in decisions]
    dropped = {row for row, word in of_rows if word == DROP}
    others = [word for row, word in of_rows if row in dropped and word != DROP]
    kept = f", {others.count('keep'):,} of them decided keep" if "keep" in others else ""
    return f", with {counted(len(others), 'other answer')} of their conversations{kept}" if others else ""


def excluded_names(path: str, known: Set[str], said: Callable[[str], Iterable[Sequence[str]]]) -> tuple[set[str], str]:
    """Return the rows that a file leaves out, by id or by `file:line`, and what `left_out_with` says.

    A list has a name in each line, of a row or of a turn. A row of a table is known by its id, or else by its place:
    the id of a row without its own is made from its content. If the table has the texts, the row that is there must
    have one of them, since a deleted line moves the rows behind it.

    known  the ids and places of all rows
    said   function: a place -> question and response of each answer there
    Raises ConfigError for a file that cannot be read.
    """
    text = text_of(place_of(path), "data.exclude")
    lines = read_decisions(text, path)
    if not lines:
        return {RESERVED_ID.sub("", line.strip()) for line in text.split("\n")} - {""}, ""
    names = set()
    for line in lines:
        if line["decision"] == DROP:
            name, place = RESERVED_ID.sub("", line["id"]), line["source"]  # c1@turn0 -> c1: the row is left out
            moved = name not in known and place in known and _is_there(line, said(place))
            names.add(place if moved else name)
    return names, left_out_with((line["id"], line["decision"]) for line in lines)


def _is_there(line: Mapping[str, str], answers: Iterable[Sequence[str]]) -> bool:
    """Return True if an answer has the question, or the response, of a line, or if the line has none of these."""
    if not line.keys() >= TEXTS:
        return True
    before = in_words(line["prompt"]), in_words(line["response"])
    return any(in_words(text) == words != [] for texts in answers for text, words in zip(texts, before, strict=True))
