"""Labels of rows that an option names."""

from collections.abc import Sequence

from sftmix.components.component import require
from sftmix.types import Scores
from sftmix.words.fields import listed


def check_labels(key: str, wanted: Sequence[str], scores: Scores) -> Sequence[str | None]:
    """Return the rows' labels if each of the wanted ones, at least one, is among them; else raise ConfigError."""
    labels = scores.label or []
    present = sorted(filter(None, set(labels)))
    allowed = f"labels of the rows, {listed(present)} (from data.label_field or data.labels)"
    require(len(wanted) > 0 and set(wanted).issubset(present), key, wanted, allowed)
    return labels
