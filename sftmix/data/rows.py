"""Rows -> checked conversations (or documents) with ids, for training and held out. No tokenizer or model is needed."""

from sftmix.common.errors import ConfigError, DataError, refuse
from sftmix.common.fields import listed
from sftmix.data.choice import divide, exclude, in_both, repeated
from sftmix.data.reading import read_side
from sftmix.data.report import DataReport
from sftmix.data.store import Conversations, Prepared
from sftmix.data.thoughts import TAGS, THOUGHT_FIELDS
from sftmix.options import DataOptions

OF_CONVERSATIONS = (
    "renderer",
    "template",
    "template_options",
    "thoughts",
    "multi_turn",
    "trained_turns",
    "roles",
    "labels",
)
"""Options that say nothing of plain text."""


def prepare(options: DataOptions, seed: int, *, progress: bool = True) -> Prepared:
    """Read, check and number all rows, and decide which are held out (by data.seed, or else by `seed`).

    Raises ConfigError for options that exclude each other. Raises DataError for a file that cannot be read, and for bad
    rows unless data.skip_bad is set: the message counts them and lists `file:line: reason` of the first.
    """
    refuse(list(options.problems()), "the options of the rows")
    train, report = read_side("data.train", options, progress)
    thinking = _thinks(train, report, options)
    _refuse_for_kind(options, train.is_text)
    seed = seed if options.seed is None else options.seed
    if options.exclude is not None:
        train = exclude(train, options.exclude, report)
    train = repeated(train, report, drop=options.duplicates == "drop")
    held_out = None
    if options.eval is not None:
        held_out, more = read_side("data.eval", options, progress)
        repeated(held_out, more)
        report.take(more)
        if train.is_text != held_out.is_text:
            raise DataError("data.train or data.eval holds plain text, the other conversations: a run takes one kind")
    elif options.eval_fraction is not None:
        train, held_out = divide(train, options.eval_fraction, seed)
    limit = options.limit
    # For text, data.limit counts windows; these are cut later, from the tokens.
    if limit is not None and not train.is_text and len(train.records) > limit:
        report.notes.append(f"{len(train.records) - limit:,} training rows left out (data.limit)")
        train = train.some(train.records[:limit])
    if held_out is not None:
        in_both(held_out, train, report)
    return Prepared(train, held_out, report, options, thinking)


def _refuse_for_kind(options: DataOptions, is_text: bool) -> None:
    """Raise ConfigError for options that say nothing of rows of this kind."""
    if options.packing and not is_text:
        raise ConfigError("data.packing true is for plain text: conversations are never packed; set it to null")
    for name in OF_CONVERSATIONS if is_text else ():
        if (value := getattr(options, name)) != getattr(DataOptions, name):
            raise ConfigError(f"data.{name} ({value}) and data.format text exclude each other: leave it out")
    if is_text and options.label_field is not None and options.packing is not False:
        raise ConfigError(
            f"data.label_field ({options.label_field}) and data.format text exclude each other, as a window holds "
            "several documents: leave it out, or set data.packing to false"
        )


def _thinks(rows: Conversations, report: DataReport, options: DataOptions) -> bool:
    """Return True if some row has a thought. Raises DataError if none has, and data.thoughts is not train."""
    found = "thought" in report.counts
    if options.thoughts != "train" and not (found or rows.is_text):
        raise DataError(
            f"data.thoughts is {options.thoughts}, and no row of data.train has a thought, in {listed(THOUGHT_FIELDS)} "
            f"of its turns or behind {listed(TAGS)} in their content: leave it out, or give thoughts in these forms"
        )
    return found
