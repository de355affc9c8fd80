"""Topics of the least and the most confident instructions: the words that tell them apart (the paper's case study)."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import logit
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS, CountVectorizer

PRIOR = 5
"""Texts with a word, and texts without it, that are added to both halves: a rare word says little."""
TASKS = {"bill", "call", "cry", "describe", "detail", "fill", "find", "fire", "give", "mill", "move", "name", "show"}
"""Words of scikit-learn's list that name what is asked for."""
FUNCTION_WORDS = sorted(ENGLISH_STOP_WORDS - TASKS)
"""Words without a topic, such as "the" and "how"."""


def topics(texts: Sequence[str]) -> list[Any]:
    """Return for each half of 2n texts up to 20 words that it has more often, and how many texts of both have each.

    No word is a function word of English. They are ordered by the difference of the log-odds log((y + PRIOR) / (n - y +
    PRIOR)), y being the texts with the word. Empty for a language that hardly has spaces between its words, and for
    texts of function words alone.
    """
    whole, n = "".join(texts), len(texts) // 2
    # The number of texts with a word, not of its uses; scikit-learn's own pattern leaves out "C" and "7".
    counter = CountVectorizer(binary=True, token_pattern=r"(?u)\b\w+\b", stop_words=FUNCTION_WORDS)
    # English has a space in six characters; "? ! ?" has no words, nor has a text of none at all.
    if whole.count(" ") <= len(whole) / 20 or not any(map(counter.build_analyzer(), texts)):
        return []
    counts = counter.fit_transform(texts).toarray().reshape(2, n, -1).sum(1)  # [2 n, V] -> [2, V]
    # Halves of 200 texts: a word in 20 and 5 of them has 0.99, one in 1 and none 0.19, which is not shown.
    difference = np.subtract(*logit((counts + PRIOR) / (n + 2 * PRIOR)))
    words = pd.DataFrame(
        {"word": counter.get_feature_names_out(), "by": difference, "least": counts[0], "most": counts[1]}
    )
    ends = words[words.by > 0.5].nlargest(20, "by"), words[words.by < -0.5].nsmallest(20, "by")
    return [end.to_dict("records") for end in ends]
