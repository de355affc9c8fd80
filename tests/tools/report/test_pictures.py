"""Pictures, on values made for them."""

from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("plotly")
pytest.importorskip("sklearn")

from sftmix.tools.report import axes, pictures
from sftmix.tools.report.pictures import both_ends, losses, tsne
from sftmix.types import Example, Message, Split


def test_the_map_keeps_clusters_apart_and_repeats():
    rng = np.random.default_rng(0)
    hidden = np.concatenate([rng.normal(0, 1, (30, 60)), rng.normal(9, 1, (30, 60))]).astype(np.float32)
    places = tsne(hidden)
    within = np.ptp(places.reshape(2, 30, 2), axis=1).max()
    assert np.linalg.norm(places[:30].mean(0) - places[30:].mean(0)) > within
    assert np.array_equal(places, tsne(hidden))


def test_thinning_keeps_both_ends_and_leaves_no_gap():
    ordered = np.random.default_rng(1).permutation(20_000)
    rows = pictures.thinned(ordered)
    assert len(rows) == pictures.POINTS
    assert np.all(np.diff(rows) > 0)
    place = set(np.argsort(ordered)[rows].tolist())
    assert {*range(pictures.ENDS), *range(20_000 - pictures.ENDS, 20_000)} <= place
    assert np.diff(sorted(place)).max() < 8
    assert pictures.thinned(ordered[:50]).tolist() == sorted(ordered[:50].tolist())
    assert both_ends(ordered[:5], 9).tolist() == ordered[[0, 1, 3, 4]].tolist()  # no row is at both


def test_a_curve_skips_what_is_missing():
    few = [{"step": 1, "ntp": 0.5, "ntp_tokens": 3}, {"step": 2, "ntp": None}, {"step": 3, "ntp": 0.0, "ntp_tokens": 0}]
    (trace,) = losses([("target", "red", 1, few)], "ntp", "eval_nll").data
    assert (trace.x, trace.y) == ((1,), (0.5,))
    assert losses([("target", "red", 1, few[1:])], "ntp", "eval_nll") is None


def test_confidences_with_a_long_tail_are_drawn_on_a_logarithm():
    assert axes.has_long_tail(np.array([-1000.0, -10.0, -1.0]))
    assert not axes.has_long_tail(np.array([-3.0, -2.0]))
    axis = axes.log_axis(np.array([1000.0, 10.0, 1.0]), "−")
    assert (axis["type"], axis["autorange"]) == ("log", "reversed")
    assert axis["ticktext"] == ["−1", "−10", "−100", "−1,000"], "each with its sign"


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (1, 10, [1, 2, 5, 10]),
        (0.9, 150, [1, 3, 10, 30, 100]),
        (12, 130, [20, 50, 100]),
        (1, 1, [1]),
        (1e-9, 1e9, [1e-9, 1e-5, 1e-1, 1e3, 1e7]),
    ],
)
def test_ticks_are_few_and_inside(low, high, expected):
    assert axes.log_ticks(low, high) == pytest.approx(expected)


def test_one_outlier_does_not_empty_a_map():
    values = np.append(np.linspace(1.0, 2.0, 400), [1e9, np.nan])
    seen = axes.without_outliers(values, False)
    assert np.array_equal(seen[:400], values[:400])
    assert 2.1 < seen[400] < 2.5
    assert np.isnan(seen[401])
    logs = axes.without_outliers(values, True)
    assert np.array_equal(logs[:400], values[:400])
    assert logs[400] < 3
    assert axes.without_outliers(np.ones(3), True).tolist() == [1, 1, 1]


def test_a_map_says_how_many_are_outside():
    confidence, variability = -np.linspace(2.0, 30.0, 400), np.linspace(1.0, 2.0, 400)
    confidence[7], variability[7], variability[9] = -1e6, 1e6, 0.0
    scores = SimpleNamespace(confidence=confidence, variability=variability)
    train = SimpleNamespace(examples=lambda rows: [Example(str(row), (Message("user", "a"),)) for row in rows])
    view = SimpleNamespace(
        scores=scores, correctness=None, split=None, rows=SimpleNamespace(data=SimpleNamespace(train=train))
    )
    assert pictures.data_map(view, np.arange(400)).layout.meta == {"outside": 2}, (
        "a variability of 0 is at the edge as well"
    )


def counted(*series, labels=None):
    """Edges and counts of the bars that are drawn for groups with these confidences."""
    values = np.concatenate(series)
    split = Split(np.repeat(np.arange(len(series)), [len(one) for one in series]), "xy"[: len(series)])
    view = SimpleNamespace(split=split, scores=SimpleNamespace(confidence=values, label=labels))
    return pictures.bins_of(values[np.isfinite(values)]), [bar.y for bar in next(pictures.histograms(view)).data]


def test_a_histogram_counts_every_finite_value_once():
    rng = np.random.default_rng(0)
    a, b = -np.exp(rng.normal(3, 1, 500)), -np.exp(rng.normal(4, 1, 300))
    edges, counts = counted(np.append(a, np.nan), b)
    np.testing.assert_allclose(np.diff(np.log(-edges)), np.log(edges[-1] / edges[0]) / pictures.BINS, rtol=1e-9)
    assert [sum(bars) for bars in counts] == [500, 300]
    assert counts[0][3] == ((a >= edges[3]) & (a < edges[4])).sum() > 0


ONE_FAR = np.array([-50.0] + [-3.7] * 999)
NEARLY_EQUAL = [np.array([0.6, 0.6000000000000001]), np.full(9, 1e17), np.array([-1e17, -1e17 - 32])]


@pytest.mark.parametrize("values", [np.linspace(0, 1, 50), np.full(9, -2.0), np.array([5.0]), ONE_FAR, *NEARLY_EQUAL])
def test_other_confidences_have_a_linear_axis(values):
    edges, (bars,) = counted(values)
    assert np.all(np.diff(edges) > 0)
    np.testing.assert_allclose(np.diff(edges), (edges[-1] - edges[0]) / pictures.BINS, rtol=0.6)
    assert sum(bars) == len(values)


def test_a_run_without_confidence_or_without_labels_has_no_histogram():
    nothing = SimpleNamespace(split=None, scores=SimpleNamespace(confidence=np.full(3, np.nan), label=None))
    assert [*pictures.histograms(nothing)] == [None, None]


def test_hovers_are_escaped_and_short():
    text = "<b>bold</b> & </script><script>x</script> " * 40
    scores = SimpleNamespace(confidence=np.array([-1.0]), variability=np.array([0.5]))
    chart = pictures.figure("x", "y")
    example = Example("<i>", (Message("user", text), Message("assistant", text, True)))
    rows = SimpleNamespace(data=SimpleNamespace(train=SimpleNamespace(examples=lambda rows: [example])))
    pictures.add_dots(chart, SimpleNamespace(scores=scores, rows=rows), np.array([0]))
    (hover,) = chart.data[0].text
    assert len(hover) < 1200
    assert "<" not in hover.replace("<br>", "")
    assert "&lt;/script&gt;" in hover
    assert "<" not in pictures.figure("</script>", "y").to_json(engine="json")  # the page takes it as it is
