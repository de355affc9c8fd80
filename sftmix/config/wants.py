"""What a command wants of a run: the answers of its configuration by which stages are made, or left out."""

from dataclasses import dataclass
from functools import cached_property

from sftmix.components.component import KEPT, Component, Need
from sftmix.components.selection import All
from sftmix.config.run_config import RunConfig


@dataclass(frozen=True)
class Wants:
    """What a configuration wants, up to the last stage of a command; each answer is found once.

    until  the name of the last stage
    """

    config: RunConfig
    until: str = "train"

    @cached_property
    def pairs(self) -> bool:
        """True if examples are mixed in pairs."""
        return self.config.resolved_pairing() is not None

    @cached_property
    def by_confidence(self) -> bool:
        """True if the split is by what a reference says, and not by something else such as a label."""
        return reads_scores(self.config.splitter)

    @cached_property
    def by_dynamics(self) -> bool:
        """True if the confidence is computed from training dynamics, and has no scores of its own."""
        return Need.CONFIDENCE not in self.config.confidence.gives

    @cached_property
    def readers(self) -> list[Component]:
        """The components that read what the reference keeps."""
        config = self.config
        readers = (config.confidence, config.splitter, config.resolved_pairing(), config.order, config.selector)
        return [reader for reader in readers if reader]

    @cached_property
    def kept(self) -> list[str]:
        """What the reference keeps because a component needs it, in the words of `reference.keep`."""
        needed = {need for reader in self.readers for need in reader.needs}
        return sorted(word for need, word in KEPT.items() if need in needed)

    @cached_property
    def single_run(self) -> bool:
        """True if the target's own losses give the confidence: it and the split are made while the target trains."""
        online = Need.TARGET_LOSSES in self.config.reference.needs
        return online and self.pairs and self.by_confidence and self.by_dynamics

    @cached_property
    def training(self) -> bool:
        """True if the target is trained."""
        return self.until == "train"

    @cached_property
    def split(self) -> bool:
        """True if a split is made before the target is trained."""
        return self.until == "split" or (self.training and self.pairs and not self.single_run)

    @cached_property
    def selection(self) -> bool:
        """True if a selector chooses the rows before anything is scored."""
        return not isinstance(self.config.selector, All) and not reads_scores(self.config.selector)

    @cached_property
    def choice(self) -> bool:
        """True if a selector chooses after the scoring what the target is trained on."""
        return self.until in ("split", "train") and reads_scores(self.config.selector)

    @cached_property
    def confidence(self) -> bool:
        """True if a confidence is made before the target is trained."""
        ordered = self.training and reads_scores(self.config.order)
        return self.until == "confidence" or (self.split and self.by_confidence) or self.choice or ordered

    @cached_property
    def dynamics(self) -> bool:
        """True if a reference gives training dynamics before the target is trained."""
        return self.until == "reference" or (self.confidence and self.by_dynamics)


def reads_scores(component: Component | None) -> bool:
    """True for a component that needs a confidence, or the states that a reference keeps."""
    return component is not None and bool({Need.CONFIDENCE, Need.MEAN_STATES} & component.needs)
