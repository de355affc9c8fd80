"""Parts of the report that need no run: ends, topics, map, thinning, sentences."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("plotly")
pytest.importorskip("sklearn")

from sftmix.common.tables import write_eval
from sftmix.tools.report import pictures
from sftmix.tools.report.curves import CURVE, curve, difference, losses
from sftmix.tools.report.ends import both_ends, topics, tsne
from sftmix.tools.report.examples import correctness
from sftmix.tools.report.page import with_code
from sftmix.tools.report.run import text_of
from sftmix.tools.report.sentences import paired_difference
from sftmix.tools.report.several import contrast_lines
from sftmix.tools.report.tokens import chosen_rows, pieces
from sftmix.tools.report.write import write_report
from sftmix.types import NOT_COUNTED, Example, Message, RowScores, TrainingDynamics


@pytest.mark.parametrize(("size", "low", "high"), [(2, [5, 1], [4, 0]), (9, [5, 1], [4, 0])])
def test_no_row_is_at_both_ends(size, low, high):
    found = both_ends(np.array([5, 1, 3, 4, 0]), size)
    assert [rows.tolist() for rows in found] == [low, high]


def test_nothing_has_no_ends():
    assert [rows.tolist() for rows in both_ends(np.zeros(0, dtype=np.int64), 3)] == [[], []]


def test_topics_tell_instructions_apart_by_their_words():
    cooking = [f"recipe for cooking soup number {n}" for n in ("one", "two", "three", "four", "five")]
    planets = [f"describe the planet orbit around stars {n}" for n in ("one", "two", "three", "four", "five")]
    found = topics(unconfident=cooking, confident=planets)
    assert sum(t.unconfident for t in found) == pytest.approx(1)
    assert sum(t.confident for t in found) == pytest.approx(1)
    confident_end = [t for t in found if t.confident > t.unconfident]
    assert {"planet", "orbit", "stars", "cooking"} & set(confident_end[0].words.split(", ")) == {
        *("planet", "orbit", "stars")
    }
    assert all(t.confident == 0 or t.unconfident == 0 for t in found)
    assert found[0].confident > 0
    assert found[-1].unconfident > 0


def test_words_that_do_not_repeat_have_no_topic():
    assert topics(["one"], ["two"]) == []


def test_the_map_keeps_clusters_apart_and_repeats():
    rng = np.random.default_rng(0)
    hidden = np.concatenate([rng.normal(0, 1, (30, 60)), rng.normal(9, 1, (30, 60))]).astype(np.float32)
    places = tsne(hidden)
    within = max(np.ptp(part, axis=0).max() for part in (places[:30], places[30:]))
    assert np.linalg.norm(places[:30].mean(0) - places[30:].mean(0)) > within
    assert np.array_equal(places, tsne(hidden))
    assert tsne(hidden[:9]) is None


def view_of(confidence, variability):
    order = np.argsort(confidence, kind="stable")
    return SimpleNamespace(by_confidence=order, scores=SimpleNamespace(variability=variability))


def test_thinning_keeps_both_ends_and_the_most_variable():
    rng = np.random.default_rng(1)
    confidence, variability = rng.permutation(20_000).astype(float), rng.permutation(20_000).astype(float)
    rows = pictures.thinned(view_of(confidence, variability))
    assert len(rows) == pictures.POINTS
    assert np.all(np.diff(rows) > 0)
    kept = set(rows.tolist())
    for values in (confidence, -confidence, variability):
        assert kept >= set(np.argsort(-values)[: pictures.ENDS].tolist())
    middle = np.sort(confidence[rows])[pictures.ENDS : -pictures.ENDS]
    assert np.diff(middle).max() < 20  # of every seven or so: no gap in between
    few = view_of(confidence[:50], variability[:50])
    assert pictures.thinned(few).tolist() == list(range(50))


def test_a_curve_skips_what_is_missing_and_averages_long_ones():
    assert curve([1, 2, 3], [0.5, None, float("nan")]) == ([1], [0.5])
    values = np.arange(4 * CURVE, dtype=float)
    x, y = curve(list(range(len(values))), values.tolist())
    assert x == list(range(3, len(values), 4))
    assert y == values.reshape(-1, 4).mean(axis=1).tolist()


def test_confidences_with_a_long_tail_are_drawn_on_a_logarithm():
    heights, axis = pictures.confidence_axis(np.array([-1000.0, -10.0, -1.0]))
    assert heights.tolist() == [-3.0, -1.0, 0.0]
    assert dict(zip(axis["ticktext"], axis["tickvals"], strict=True))["-100"] == -2.0
    assert pictures.log_axis(np.array([-1e4, -1e5, -1.0]))[1]["ticktext"][-3:] == ["-1,000", "-10,000", "-100,000"]
    same, none = pictures.confidence_axis(np.array([-3.0, -2.0]))
    assert (same.tolist(), none) == ([-3.0, -2.0], {})


def test_the_paired_difference_is_that_of_the_examples(tmp_path):
    """Where all responses have as many tokens, it is the mean of the differences, with the error of a mean."""
    rng = np.random.default_rng(2)
    ids, tokens = [f"e{k}" for k in range(40)], np.full(40, 8)
    nll = {name: rng.uniform(8, 16, 40) for name in ("train", "baseline")}
    for name, values in nll.items():
        (tmp_path / name).mkdir()
        order = np.arange(40) if name == "train" else np.arange(40)[::-1]
        scores = RowScores(values[order], tokens, tokens)
        write_eval(tmp_path / name / "eval.parquet", [ids[k] for k in order], scores, np.zeros(40))
    each = (nll["train"] - nll["baseline"]) / 8
    mean, error = paired_difference(SimpleNamespace(path=tmp_path))
    assert mean == pytest.approx(each.mean(), rel=1e-12)
    assert error == pytest.approx(each.std(ddof=1) / np.sqrt(40), rel=1e-12)


def table_of(metric: str, **more) -> dict:
    """A table of two runs and one contrast, as table.json has it."""
    contrast = {"ours": "SFTMix", "theirs": "NTP", "mean": -0.0133, "interval": [-0.0276, 0.001], "seeds": [1, 2]}
    contrast |= {"differences": [-0.02, -0.0066], "verdict": "not tested", "p_holm": None}
    variants = {name: {"runs": []} for name in ("NTP", "SFTMix")}
    return {"metric": metric, "variants": variants, "contrasts": [contrast], "runs": 4, "runs_done": 4, **more}


def test_the_sentences_on_a_table_say_what_its_numbers_are():
    sentence = "SFTMix - NTP: -0.0133 [-0.0276, +0.0010] over 2 seeds; not tested."
    unit = "eval_nll_after (nats per response token of the held-out rows; lower is better)"
    told = "Differences in {}, with 95% intervals in brackets."
    assert contrast_lines(table_of("eval_nll_after")) == [told.format(unit), sentence]
    assert contrast_lines(table_of("eval_accuracy")) == [told.format("eval_accuracy"), sentence]
    one_seed = table_of("eval_accuracy")
    one_seed["contrasts"][0] |= {"interval": None, "seeds": [1], "verdict": "one seed"}
    assert contrast_lines(one_seed) == ["Differences in eval_accuracy.", "SFTMix - NTP: -0.0133 over 1 seed; one seed."]
    assert contrast_lines({**table_of("eval_nll_after"), "contrasts": []}) == []


@pytest.mark.parametrize("complete", [True, False])
def test_only_a_table_that_is_not_done_waits_for_a_run(tmp_path, complete):
    (tmp_path / "table.json").write_text(json.dumps(table_of("eval_nll_after", complete=complete)))
    (page,) = write_report([tmp_path], map_size=0)
    assert ("waits for the last run" in page.read_text(encoding="utf-8")) is not complete


def test_a_run_of_a_table_that_diverged_has_no_curves(tmp_path):
    table = table_of("eval_nll_after", complete=True)
    table["variants"]["SFTMix"]["runs"] = [{"seed": 1, "run": "SFTMix/seed-1", "metrics": {}}]
    (tmp_path / "SFTMix" / "seed-1").mkdir(parents=True)
    (tmp_path / "table.json").write_text(json.dumps(table))
    (page,) = write_report([tmp_path], map_size=0)
    assert "SFTMix - NTP: -0.0133" in page.read_text(encoding="utf-8")


def test_losses_of_mixup_alone_without_an_evaluation_have_no_picture():
    line = {"step": 1, "ntp": 0.0, "ntp_tokens": 0, "mixup": 2.0, "mixup_tokens": 5}
    lines = {"reference": [], "train": [line], "baseline": []}
    assert losses(SimpleNamespace(metrics=lines, summary={"eval_nll_before": 4.0})) is None
    lines["baseline"] = [{**line, "ntp": 3.0, "ntp_tokens": 7}]
    (baseline, base) = losses(SimpleNamespace(metrics=lines, summary={"eval_nll_before": 4.0})).data
    assert (list(baseline.y), list(base.x)) == ([3.0], [0, 1])
    assert difference(SimpleNamespace(metrics=lines)) is None
    lines["train"] = [{**line, "ntp": 2.5, "ntp_tokens": 7, "eval_nll": 4.0}, {**line, "step": 2, "eval_nll": 3.0}]
    lines["baseline"] = [{**line, "ntp": 3.0, "eval_nll": None}, {**line, "step": 2, "ntp": 3.0, "eval_nll": 3.5}]
    step, held_out = difference(SimpleNamespace(metrics=lines)).data  # no NTP in the target's second step
    assert [(*trace.x, *trace.y) for trace in (step, held_out)] == [(1, -0.5), (2, -0.5)]


def test_a_sentence_is_escaped_and_its_options_stay_whole():
    html = "say <code>a <span>--config</span> &lt;x&gt;</code>, <span>--a.b_c</span> true"
    assert with_code("say `a --config <x>`, --a.b_c true") == html


def test_the_most_changed_responses_are_those_of_the_others():
    """The row that changed most of all is at an end, and shown there."""
    order = np.arange(20)
    scores = SimpleNamespace(variability=np.linspace(1, 0, 20))
    found = chosen_rows(SimpleNamespace(by_confidence=order, scores=scores))
    assert {name: rows.tolist() for name, rows in found.items()} == {
        "least confident": [0, 1, 2, 3],
        "most confident": [19, 18, 17, 16],
        "most changed of the others, over the checkpoints": [4, 5, 6, 7],
    }


def test_correctness_is_of_rows_that_every_checkpoint_counted():
    correct, n_tokens = np.array([[1, 4], [NOT_COUNTED, 2], [0, 0]]), np.array([5, 4, 0])
    dynamics = TrainingDynamics(["a", "b", "c"], np.arange(2), np.ones((3, 2)), n_tokens, correct)
    assert correctness(SimpleNamespace(dynamics=dynamics)).tolist() == pytest.approx([0.5, np.nan, np.nan], nan_ok=True)


def test_the_text_of_an_example_names_roles_where_there_are_several():
    user, answer = Message("user", "Hi"), Message("assistant", "Hello", trained=True)
    assert text_of(Example("a", (user, answer))) == ("Hi", "Hello")
    system = Message("system", "Be kind")
    assert text_of(Example("a", (system, user, answer))) == ("system: Be kind\n\nuser: Hi", "Hello")
    assert text_of(Example("a", (Message("text", "A window", trained=True),))) == ("", "A window")


class Bytes:
    """A tokenizer of single bytes."""

    def decode(self, ids, clean_up_tokenization_spaces):
        return bytes(ids).decode("utf-8", errors="replace")


def test_pieces_of_a_character_are_shown_with_its_last_token():
    ids = list("a é€b".encode())
    found = pieces(Bytes(), ids)
    assert found == ["a", " ", "", "é", "", "", "€", "b"]
    assert "".join(pieces(Bytes(), ids[:-2])) == "a é\N{REPLACEMENT CHARACTER}"  # cut in the middle


def test_hovers_are_escaped_and_short():
    text = "<b>bold</b> & </script><script>x</script> " * 40
    view = SimpleNamespace(scores=SimpleNamespace(id=["<i>"]), texts=[(text, text)])
    (found,) = pictures.hovers(view, np.array([0]))
    assert len(json.dumps(found)) < 1200
    assert "<" not in found.replace("<br>", "")
    assert "&lt;/script&gt;" in found
