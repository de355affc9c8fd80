"""Superfiltering (arXiv 2402.00530): a small model chooses; `--selector superfiltering.Superfiltering --objective NTP
--confidence IFD --reference.response_alone true` and `--reference.model.path` with the small model."""

from cherry import Cherry


class Superfiltering(Cherry):
    """Cherry rows under a small model, which is the reference, with `--reference.checkpoints '[0]'` as it is; left out:
    the authors' shares, and their score, a ratio of perplexities, for which this one of mean NLLs stands."""
