"""Responses token by token."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("plotly")

from sftmix.tools.report.look import pieces, response_of
from sftmix.tools.report.run import read_run


@pytest.mark.long
def test_tokens_are_those_of_the_response_with_their_nll_before_and_after(run, monkeypatch):
    monkeypatch.chdir(run.parent)
    view = read_run(Path("run"))
    count = int(view.rows.data.train[5].target.sum())
    before, after = np.arange(count) + 1.0, np.arange(count) / 2
    shown = response_of(view, 5, before, after)
    end = view.rows.encoder.tokenizer.decode([view.rows.encoder.end_of_turn_id])
    assert "".join(token.text for token in shown.tokens) == view.texts[5][1] + end
    assert [(token.before, token.after) for token in shown.tokens] == list(zip(before, after, strict=True))


class Bytes:
    """A tokenizer of single bytes."""

    def decode(self, ids, clean_up_tokenization_spaces):
        return bytes(ids).decode("utf-8", errors="replace")


def test_pieces_of_a_character_are_shown_with_its_last_token():
    ids = list("a é€b".encode())
    found = pieces(Bytes(), ids)
    assert found == ["a", " ", "", "é", "", "", "€", "b"]
    assert "".join(pieces(Bytes(), ids[:-2])) == "a é\N{REPLACEMENT CHARACTER}"  # cut in the middle
