from dataclasses import replace

import numpy as np
from confidence_lab.callback import WatchMixup
from confidence_lab.confidence import WorstToken
from confidence_lab.objective import FadingMixup
from confidence_lab.optimizer import Lion
from confidence_lab.order import ShortestFirst
from confidence_lab.pairing import NearestInLength
from confidence_lab.perturbation import TokenDropout
from confidence_lab.reference import LateReference
from confidence_lab.renderer import Lines
from confidence_lab.row_format import Interview
from confidence_lab.schedule import Pulse
from confidence_lab.selector import AtLeastTokens
from confidence_lab.splitter import Thirds
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sftmix import testing
from sftmix.types import Example, Message


def with_tokens(dynamics):
    """Dynamics that were kept token by token."""
    rng = np.random.default_rng(len(dynamics.ids))
    sizes = [(len(dynamics.steps), n) for n in dynamics.n_tokens.tolist()]
    return replace(dynamics, token_nll=[rng.gamma(2.0, 1.0, size).astype(np.float32) for size in sizes])


def of_bytes():
    """A tokenizer whose tokens are bytes, and an end."""
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<end>"]
    backend = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")


def test_renderer():
    turns = [("system", "Be brief."), ("user", "Two colours?"), ("assistant", "Red, blue."), ("user", "And one more?")]
    told = tuple(Message(who, text, trained=who == "assistant") for who, text in [*turns, ("assistant", "Green.")])
    testing.check_renderer(Lines(), of_bytes(), [Example("a", told), Example("b", told[1:3])])


def test_row_format():
    rows = [{"interview": "Q: What is 2 + 2?\nA: 4\nQ: And 3 + 3?\nA: 6"}, {"interview": "Q: Who?\nA: Me", "id": "b"}]
    testing.check_row_format(Interview(), rows)


def test_reference():
    testing.check_reference(LateReference(start=0.4))


def test_confidence():
    testing.check_confidence_estimator(WorstToken(), dynamics=testing.training_dynamics().map(with_tokens))


def test_splitter():
    testing.check_splitter(Thirds())


def test_order():
    testing.check_order(ShortestFirst())


def test_pairing():
    testing.check_pair_sampler(NearestInLength())


def test_selector():
    testing.check_selector(AtLeastTokens(tokens=3))


def test_schedule():
    testing.check_schedule(Pulse(period=4))


def test_objective():
    testing.check_objective(FadingMixup(mu=Pulse(period=2)))


def test_optimizer():
    testing.check_optimizer(Lion())


def test_perturbation():
    testing.check_perturbation(TokenDropout(rate=0.3))


def test_callback():
    testing.check_callback(WatchMixup())
