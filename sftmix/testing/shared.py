"""What the checks of all kinds of components share: many inputs, copies that answer the same, and order."""

import copy
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sftmix.components.component import OF_DYNAMICS, Component, Need
from sftmix.types import Int64
from sftmix.words.errors import ContractError, SFTMixError

Ask = Callable[..., Any]
"""What a check asks: (component, record, ...) -> the component's answer."""


def on_examples(strategy: st.SearchStrategy[Any], holds: Callable[[Any], Any]) -> list[Any]:
    """Return what `holds` gives for inputs. An SFTMixError refuses an input: some may be refused, but not all."""
    answers, refusals = [], []

    @settings(
        max_examples=50,
        derandomize=True,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,  # one failure in words; several are raised as an ExceptionGroup without any
    )
    @given(strategy)
    def check(value):
        try:
            answers.append(holds(value))
        except ContractError:
            raise
        except SFTMixError as refusal:
            refusals.append(refusal)

    check()
    assert answers, f"every input was refused (options, or the check's scores, may fit), last: {refusals[-1]}"
    return answers


@contextmanager
def no_global_draws() -> Iterator[None]:
    """Check that the global random states are the same afterwards."""

    def states():
        of_numpy: Any = np.random.get_state()
        _, numbers, *place = of_numpy
        return random.getstate(), numbers.tobytes(), place, torch.random.get_rng_state().numpy().tobytes()

    before, loaded = states(), len(sys.modules)
    yield
    if len(sys.modules) > loaded:  # an import may draw, as scikit-learn's does; the next input is looked at again
        return
    assert states() == before, "it touched a global random state; draw from sftmix.ranks.rng.generator(seed, ...)"


def answer_of(component: Component, ask: Ask, *records: Any) -> Any:
    """Return ask(component, *records): a copy must answer the same, and the records must stay as they are."""
    fresh = copy.deepcopy(component)  # each input finds the same component
    before = [asdict(record) for record in records]
    with no_global_draws():
        answer = ask(fresh, *records)
    np.testing.assert_equal([asdict(record) for record in records], before, "a record was changed in place")
    message = "a copy answers something else: keep no state, and draw from sftmix.ranks.rng.generator(seed, ...)"
    np.testing.assert_equal(ask(copy.deepcopy(fresh), *records), answer, message)
    return answer


def with_needs_alone(ask: Ask) -> Ask:
    """Return `ask` with a record that lacks what the component could need and does not: a run may lack it as well."""

    def asked(component, record, *others):
        fields = {need: field for need, field in _read_by(component).items() if need not in component.needs}
        absent = {field: None for field in fields.values() if hasattr(record, field)}
        try:
            return ask(component, replace(record, **absent), *others)
        except (TypeError, AttributeError) as error:
            names = ", ".join(f"Need.{need.name} for {field}" for need, field in fields.items() if field in absent)
            raise AssertionError(f"{error}: if it reads what nothing gives it here, add to `needs`: {names}") from error

    return asked


def _read_by(component: Component) -> dict[Need, str]:
    """Return need -> the field of a record that it is about.

    A run fills n_correct and confidence with numbers, -1 and NaN, if nothing gives them. Pairings read the confidence
    if it is there, and order the two rows of a pair by it.
    """
    filled = {Need.CONFIDENCE: "confidence"} if component.option == "order" else {Need.CORRECT: "n_correct"}
    return OF_DYNAMICS | filled


def permuted(record: Any, order: Int64) -> Any:
    """Return a record of N examples with these in another order; `row` stays 0..N-1."""

    def moved(values):
        if values is None:
            return None
        if isinstance(values, dict):
            return {name: moved(column) for name, column in values.items()}
        return values[order] if isinstance(values, np.ndarray) else [values[i] for i in order]

    columns = asdict(record).items()  # steps are the checkpoints' own; a list (ids, texts) has no index by an array
    return replace(record, **{name: moved(values) for name, values in columns if name not in ("row", "steps")})


def check_rows(component: Component, inputs: st.SearchStrategy[Any], ask: Ask) -> None:
    """Check ask(component, record), an answer for each of N examples, whose order must not matter."""

    needed = with_needs_alone(ask)

    def holds(record):
        values = answer_of(component, needed, record)
        order = np.random.default_rng(len(values)).permutation(len(values))  # the same one in each run
        message = "it depends on the order of the examples; break ties by id"
        np.testing.assert_allclose(
            needed(component, permuted(record, order)), values[order], rtol=1e-12, err_msg=message
        )

    on_examples(inputs, holds)
