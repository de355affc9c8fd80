"""Text of rows as the model will see them."""

import itertools
import sys
from collections.abc import Sequence

import numpy as np

from sftmix.cli.say import for_terminal
from sftmix.data import LoadedData
from sftmix.text.encoder import Encoder
from sftmix.words.shown import as_lines, printable

EDGE = 8
"""Tokens shown on both sides of the places where a response, or a prompt, begins or ends."""


def render_preview(data: LoadedData, encoder: Encoder, rows: Sequence[int], *, color: bool = True) -> str:
    """Text of the given training rows, a table of tokens of the first of them, and the report on all rows.

    The response, which is all tokens that carry loss, is green; without colour it is in [[ ]].
    """

    def spelt(token: int) -> str:
        return printable(repr(encoder.tokenizer.convert_ids_to_tokens(token)))

    end = encoder.end_of_turn_id
    parts = [f"Template: {encoder.name}; trained texts end with {spelt(end)} (id {end}); stop ids {encoder.stop_ids}"]
    begin, close = ("\x1b[0;32m", "\x1b[0m") if color else ("[[", "]]")
    table = list[str]()
    for row in rows:
        encoded, example = data.train[row], data.train.example(row)
        ids, target = encoded.input_ids, encoded.target
        edges = [0, *(np.flatnonzero(np.diff(target)) + 1).tolist(), len(ids)]  # mask 0 0 1 1 1 0 -> 0, 2, 5, 6
        body = decoded = ""
        for start, stop in itertools.pairwise(edges):  # all of these tokens are trained, or none
            # Decoded from the start each time: a tokenizer may write a token differently at the beginning of a text.
            shown, decoded = len(decoded), encoder.decode(ids[:stop])
            piece = printable(decoded[shown:])
            body += f"{begin}{piece}{close}" if target[start] else piece
        facts = f"row {row} | id {encoded.id} | {example.source} | {len(ids)} tokens | {target.sum()} trained"
        facts += "" if example.label is None else f" | label {example.label}"
        facts += " | cut at the maximum length: no end of turn" if encoded.truncated else ""
        parts.append(f"{as_lines(facts, but='')}\n{body}")
        if not table:
            table = [f"Tokens of row {row} (label -100: not trained)", f"{'place':>6} {'id':>7} {'label':>7}  token"]
            # [edges, 2 EDGE] places, EDGE on both sides of each edge.
            near = np.add.outer(edges, np.arange(-EDGE, EDGE)).clip(0, len(ids) - 1)
            for place in np.unique(near).tolist():
                token = int(ids[place])
                table.append(f"{place:>6} {token:>7} {token if target[place] else -100:>7}  {spelt(token)}")
    return "\n\n".join([*parts, "\n".join(table), for_terminal("\n".join(["Rows", *data.report.lines()]), sys.stdout)])
