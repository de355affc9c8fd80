"""Pictures, on values made for them; and the pairs on the page, with the lambdas of the training."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("plotly")
pytest.importorskip("sklearn")

from sftmix.common.rng import generator
from sftmix.common.tables import read_split
from sftmix.tools.report import pictures
from sftmix.tools.report.pictures import both_ends, confidence_axis, losses, tsne
from sftmix.tools.report.run import read_run
from sftmix.tools.report.write import PAIRS, mixed_pairs
from sftmix.types import Example, Message


@pytest.mark.parametrize("size", [2, 9])
def test_no_row_is_at_both_ends(size):
    assert both_ends(np.array([5, 1, 3, 4, 0]), size).tolist() == [5, 1, 4, 0]


def test_the_map_keeps_clusters_apart_and_repeats():
    rng = np.random.default_rng(0)
    hidden = np.concatenate([rng.normal(0, 1, (30, 60)), rng.normal(9, 1, (30, 60))]).astype(np.float32)
    places = tsne(hidden)
    within = max(np.ptp(part, axis=0).max() for part in (places[:30], places[30:]))
    assert np.linalg.norm(places[:30].mean(0) - places[30:].mean(0)) > within
    assert np.array_equal(places, tsne(hidden))


def test_thinning_keeps_both_ends_and_leaves_no_gap():
    ordered = np.random.default_rng(1).permutation(20_000)
    rows = pictures.thinned(ordered)
    assert len(rows) == pictures.POINTS
    assert np.all(np.diff(rows) > 0)
    place = np.sort(np.argsort(ordered)[rows])
    ends = np.arange(pictures.ENDS)
    assert np.array_equal(place[: pictures.ENDS], ends)
    assert np.array_equal(place[-pictures.ENDS :], 20_000 - pictures.ENDS + ends)
    assert np.diff(place).max() < 8
    assert pictures.thinned(ordered[:50]).tolist() == sorted(ordered[:50].tolist())


def test_a_curve_skips_what_is_missing():
    few = [{"step": 1, "ntp": 0.5, "ntp_tokens": 3}, {"step": 2, "ntp": None}, {"step": 3, "ntp": 0.0, "ntp_tokens": 0}]
    (trace,) = losses([("target", "red", few)], "ntp", "eval_nll").data
    assert (trace.x, trace.y) == ((1,), (0.5,))
    assert losses([("target", "red", few[1:])], "ntp", "eval_nll") is None


def test_confidences_with_a_long_tail_are_drawn_on_a_logarithm():
    sizes, axis = confidence_axis(np.array([-1000.0, -10.0, -1.0]))
    assert (sizes.tolist(), axis["type"], axis["autorange"]) == ([1000.0, 10.0, 1.0], "log", "reversed")
    same, none = confidence_axis(np.array([-3.0, -2.0]))
    assert (same.tolist(), none) == ([-3.0, -2.0], {})


def test_hovers_are_escaped_and_short():
    text = "<b>bold</b> & </script><script>x</script> " * 40
    scores = SimpleNamespace(id=["<i>"], confidence=np.array([-1.0]), variability=np.array([0.5]))
    chart = pictures.figure("x", "y")
    example = Example("<i>", (Message("user", text), Message("assistant", text, True)))
    pictures.add_dots(chart, SimpleNamespace(scores=scores, examples=[example]), np.array([0]))
    (hover,) = chart.data[0].text
    assert len(hover) < 1200
    assert "<" not in hover.replace("<br>", "")
    assert "&lt;/script&gt;" in hover
    assert "<" not in pictures.figure("</script>", "y").to_json(engine="json")  # the page takes it as it is


def test_the_first_pairs_are_shown_token_by_token(finished):
    view = read_run(finished.path)
    tables = mixed_pairs(view)
    ids, split = read_split(finished.path / "split" / "split.parquet")
    groups = dict(zip(ids, (split.names[group] for group in split.group), strict=True))
    tokenizer = view.rows.encoder.tokenizer
    responses = {example.id: example.input_ids[example.target] for example in view.rows.data.train}
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


def test_nothing_is_shown_where_nothing_was_mixed(finished):
    assert not mixed_pairs(replace(read_run(finished.path), split=None))
    view = read_run(finished.path)
    object.__setattr__(view.config, "pairing", None)
    assert not mixed_pairs(view)
