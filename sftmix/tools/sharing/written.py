"""Cards as files. A card that a user has edited is never written over; one that nobody has edited follows the run.

The last line of a card that is written here is a comment with the hash of the text above it. So an edited card is told
from one that is as it was written.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from huggingface_hub import ModelCard, metadata_load, metadata_save

from sftmix.common.files import write_text
from sftmix.config import RunConfig
from sftmix.tools.sharing.cards import ARMS, CARD, model_card
from sftmix.tools.sharing.facts import facts_of

_SEAL = "\n<!-- sha256 of the text above, which this program wrote: {} -->\n"


def write_cards(run: Path, config: RunConfig | None = None) -> list[Path]:
    """Write the cards of train/model and baseline/model as the run's files are now; return the files that changed.

    A stage without a model gets none, and a card that was edited stays.
    config  of the run, where it is known; None reads it from the run
    """
    written = []
    files = {stage: run / stage / "model" / CARD for stage in ARMS}
    files = {stage: file for stage, file in files.items() if file.parent.is_dir() and not is_edited(file)}
    if not files:
        return []
    facts = facts_of(run, config)
    for stage, file in files.items():
        text = _sealed(model_card(facts, stage))
        if not file.exists() or file.read_text(encoding="utf-8") != text:
            write_text(file, text)
            written.append(file)
    return written


def write_card(file: Path, card: ModelCard) -> None:
    """Write the card; of one that is there and was edited only the licence in its header is set."""
    if not is_edited(file):
        write_text(file, _sealed(card))
    elif (license := card.data.get("license")) is not None:
        metadata_save(file, {**(metadata_load(file) or {}), "license": license})


def is_edited(file: Path) -> bool:
    """Return True for a card that is there and is not as it was written here."""
    if not file.exists():
        return False
    text = file.read_text(encoding="utf-8")
    above, found, _ = text.rpartition(_SEAL.partition("{}")[0])
    return not found or text != above + _seal_of(above)


def _sealed(card: ModelCard) -> str:
    return str(card) + _seal_of(str(card))


def _seal_of(text: str) -> str:
    return _SEAL.format(hashlib.sha256(text.encode()).hexdigest())
