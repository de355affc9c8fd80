"""A preview of the rows as the model sees them: text with the response in colour, a table of tokens, dropped rows."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from sftmix.common.shown import one_line, printable
from sftmix.data.dataset import EncodedDataset, LoadedData
from sftmix.data.templates import Encoder
from sftmix.types import Encoded

_GREEN, _DIM, _BOLD, _PLAIN = "\x1b[32m", "\x1b[2m", "\x1b[1m", "\x1b[0m"
_RESPONSE = "\x1b[0;32m"
_EDGE = 8
"""Tokens shown at both ends of a run in the table."""


def render_preview(data: LoadedData, encoder: Encoder, rows: Sequence[int], *, color: bool = True) -> str:
    """Text of the given training rows, the token table of the first of them, and the report on all rows.

    The response, which is all tokens that carry loss, is green; without colour it stands in [[ ]].
    """

    def paint(code: str, text: str) -> str:
        if color:
            return f"{code}{text}{_PLAIN}"
        return f"[[{text}]]" if code == _RESPONSE else text

    end = f"{encoder.tokenizer.convert_ids_to_tokens(encoder.end_of_turn_id)!r} (id {encoder.end_of_turn_id})"
    first = f"Template: {encoder.name}; a response ends with {end}; stop ids {encoder.stop_ids}"
    if data.train.is_text:
        first = f"Plain text: a document ends with {end}; the first token of each piece is not trained"
    parts = [first]
    parts += [_text(data.train, encoder, row, paint) for row in rows]
    if len(rows):
        parts.append(_table(data.train[rows[0]], encoder, paint))
    parts.append("\n".join([paint(_BOLD, "Rows"), *data.report.lines()]))
    return "\n\n".join(parts)


def runs(encoded: Encoded) -> Iterator[tuple[int, int, bool]]:
    """Cut an example into runs (start, end, trained): a run holds only response tokens, or none."""
    edges = np.flatnonzero(np.diff(encoded.target)) + 1
    bounds = [0, *edges.tolist(), len(encoded.target)]
    for start, end in itertools.pairwise(bounds):
        yield start, end, bool(encoded.target[start])


def _text(dataset: EncodedDataset, encoder: Encoder, row: int, paint: Callable[[str, str], str]) -> str:
    encoded, example = dataset[row], dataset.example(row)
    facts = [f"row {encoded.row}", f"id {encoded.id}", example.source, f"{len(encoded.input_ids)} tokens"]
    facts.append(f"{int(encoded.target.sum())} trained")
    facts += [f"label {example.label}"] if example.label is not None else []
    facts += ["cut at the maximum length: no end of turn"] if encoded.truncated else []
    body, done = "", ""
    documents = () if encoded.starts is None else encoded.starts.tolist()
    for start, end, trained in runs(encoded):
        if start in documents:
            body += ("\n" if body else "") + paint(_DIM, "--- a document ---") + "\n"
        # Decoded from the start each time: a tokenizer may write a token differently at the beginning of a text.
        so_far = encoder.decode(encoded.input_ids[:end])
        piece = printable(so_far[len(done) :])
        body, done = body + (paint(_RESPONSE, piece) if trained else piece), so_far
    return f"{paint(_BOLD, one_line(' | '.join(facts)))}\n{body}"


def _table(encoded: Encoded, encoder: Encoder, paint: Callable[[str, str], str]) -> str:
    """Table of place, id, label (-100 = not trained) and token, without the middle of long runs."""
    lines = [paint(_BOLD, f"Tokens of row {encoded.row}"), f"{'place':>6} {'id':>7} {'label':>7}  token"]
    for start, end, trained in runs(encoded):
        for place in range(start, end):
            if place == start + _EDGE and end - start > 2 * _EDGE + 1:
                lines.append(paint(_DIM, f"{'...':>6} {end - start - 2 * _EDGE} more"))
            if start + _EDGE <= place < end - _EDGE and end - start > 2 * _EDGE + 1:
                continue
            token = int(encoded.input_ids[place])
            piece = printable(repr(encoder.tokenizer.convert_ids_to_tokens(token)))
            line = f"{place:>6} {token:>7} {token if trained else -100:>7}  {piece}"
            lines.append(paint(_GREEN, line) if trained else line)
    return "\n".join(lines)
