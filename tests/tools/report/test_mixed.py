"""The pairs on the page are those of the first step, with the lambdas of the training."""

import pytest

pytest.importorskip("plotly")

from sftmix.common.rng import generator
from sftmix.common.tables import read_split
from sftmix.tools.report.mixed import PAIRS, mixed_pairs
from sftmix.tools.report.run import read_run


def test_the_first_pairs_are_shown_token_by_token(finished):
    view = read_run(finished.path)
    tables = mixed_pairs(view).tables
    ids, split = read_split(finished.path / "split" / "split.parquet")
    groups = dict(zip(ids, (split.names[group] for group in split.group), strict=True))
    tokenizer, responses = view.rows.encoder.tokenizer, {}
    for example in view.rows.data.train:
        responses[example.id] = example.input_ids[example.target]
    assert len(tables) == PAIRS
    for (first, second, _), *rows in tables:
        (group_c, id_c), (group_u, id_u) = first.split(), second.split()
        assert (group_c, group_u) == (groups[id_c], groups[id_u]) == ("confident", "unconfident")
        lam = generator(view.config.seed, "lambda", 0, id_c, id_u).beta(0.5, 0.5)
        n_mixed = min(len(responses[id_c]), len(responses[id_u]), 24)
        assert [row[2] for row in rows] == [f"{lam:.2f}"] * n_mixed + [""] * (len(rows) - n_mixed)
        for column, name in enumerate((id_c, id_u)):
            shown = [tokenizer.decode([token]) for token in responses[name][:24]]
            assert [row[column] for row in rows] == shown + [""] * (len(rows) - len(shown))


@pytest.mark.parametrize("given", [{"pairing": None}, {"split": None}])
def test_nothing_is_shown_where_nothing_was_mixed(finished, given):
    view = read_run(finished.path)
    for name, value in given.items():
        object.__setattr__(view.config if name == "pairing" else view, name, value)
    assert not mixed_pairs(view).tables
