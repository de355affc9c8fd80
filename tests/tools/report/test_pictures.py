"""Pictures, on values made for them."""

from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("plotly")
pytest.importorskip("sklearn")

from sftmix.tools.report import pictures
from sftmix.tools.report.pictures import both_ends, confidence_axis, losses, tsne


@pytest.mark.parametrize(("size", "low", "high"), [(2, [5, 1], [4, 0]), (9, [5, 1], [4, 0])])
def test_no_row_is_at_both_ends(size, low, high):
    found = both_ends(np.array([5, 1, 3, 4, 0]), size)
    assert [rows.tolist() for rows in found] == [low, high]


def test_the_map_keeps_clusters_apart_and_repeats():
    rng = np.random.default_rng(0)
    hidden = np.concatenate([rng.normal(0, 1, (30, 60)), rng.normal(9, 1, (30, 60))]).astype(np.float32)
    places = tsne(hidden)
    within = max(np.ptp(part, axis=0).max() for part in (places[:30], places[30:]))
    assert np.linalg.norm(places[:30].mean(0) - places[30:].mean(0)) > within
    assert np.array_equal(places, tsne(hidden))
    assert tsne(hidden[:9]) is None


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
    (hover,) = pictures.dots(SimpleNamespace(scores=scores, texts=[(text, text)]), np.array([0])).text
    assert len(hover) < 1200
    assert "<" not in hover.replace("<br>", "")
    assert "&lt;/script&gt;" in hover
