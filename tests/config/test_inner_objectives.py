"""An objective that holds another one passes on what that one says of itself."""

from sftmix.components import NTP, Need, Objective, ProFit, SFTMix
from tests.config.test_config import refusal


class Holds(NTP):
    """An objective that holds another one, and passes on what it is told to."""

    def __init__(self, *, inner: Objective, needs: bool = True, decay: float | None = None):
        self.inner, self.teacher_decay = inner, decay
        if needs:
            self.needs = inner.needs


class Averaged(NTP):
    needs, teacher_decay = frozenset({Need.TEACHER}), 0.9


def test_what_an_objective_does_not_pass_on_of_another_one_is_refused():
    said = refusal(objective=Holds(inner=SFTMix(), needs=False))
    assert "objective Holds holds SFTMix, which needs pairs of examples: add to `needs` of Holds" in said
    said = refusal(objective=Holds(inner=Averaged()))
    assert "objective Holds holds Averaged: set its teacher_decay to 0.9, as Averaged has" in said
    for passed in (Holds(inner=SFTMix()), Holds(inner=Averaged(), decay=0.9), ProFit(mixup=SFTMix())):
        assert refusal(objective=passed) == ""
