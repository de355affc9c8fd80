"""The rows."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from sftmix.disk.places import path_problem
from sftmix.options.ranges import out_of_range
from sftmix.words.fields import ROLES, TEXT, FormatName, MultiTurn, SpecialTokens, Thoughts, TrainedTurns
from sftmix.words.given import OptionFields, as_list

LENGTHS = "at least 2 (a prompt and a response token), or null"
"""What max_length may be, of the target's rows and of a reference's."""

_DATA = (
    ("eval_fraction", lambda v: 0 < v < 1, "in (0, 1), or null"),
    ("max_length", lambda v: v >= 2, LENGTHS),
    ("limit", lambda v: 1 <= v <= 10**18, "at least 1 and at most 10**18, or null"),  # it counts in 64 bits
)


OF_CONVERSATIONS = ("template", "template_options", "thoughts", "multi_turn", "trained_turns", "roles", "labels")
"""Options that say nothing of plain text."""

_LISTS = ("train", "eval", "labels")
"""Options for which a single value counts as a list of one, in YAML, on the command line and in Python."""


@dataclass(kw_only=True)
class DataOptions(OptionFields):
    train: list[str] | str = field(default_factory=list)
    """Training rows: files (.json .jsonl .parquet .arrow .csv .txt), directories or hub ids (NAME:SUBSET@SPLIT,
    NAME@train[:50%]), one after the other."""
    eval: list[str] | str | None = None
    """Held-out rows from files of their own. Excludes data.eval_fraction."""
    eval_fraction: float | None = None
    """Share of the training rows to hold out, chosen by id and seed, in (0, 1); of text, at least two documents.
    Excludes data.eval."""
    seed: int | None = None
    """Seed by which data.eval_fraction chooses rows; null: the run's seed."""
    format: FormatName = "auto"
    """Format of the rows; auto recognises it from the fields of each row. text: documents without turns (.txt files, or
    rows with a field `text`), every token trained."""
    columns: dict[str, str | None] | None = None
    """Names of the fields in the rows, ours first: {prompt: question, response: answer}. Ours are the fields of one
    format (response stands for completion), system, id, weight and tools. null: that field is not read; {id: null} is
    for ids that begin anew in each file."""
    packing: bool | None = None
    """Text only. true, or null: documents fill windows of exactly max_length tokens. false: each example is a piece of
    one document."""
    template: str | None = None
    """null: the tokenizer's own chat template, or alpaca if it has none; alpaca; chatml; or a Jinja file."""
    template_options: dict[str, Any] | None = None
    """Values of the chat template's variables, as {enable_thinking: false}; the exported template has them as well."""
    thoughts: Thoughts = "train"
    """Thoughts of an assistant (reasoning_content, reasoning or thinking of a turn, or <think> in its content).
    train: trained with the answer. drop: left out."""
    special_tokens: SpecialTokens = "text"
    """What the spelling of a special token in a row becomes (`<|im_end|>`, `</s>`). text: text, so that no row can end
    a turn. tokens: that token, for rows that you trust."""
    max_length: int | None = None
    """Tokens per example; longer ones are cut at the end. null: the smaller of 2048 and the model's context."""
    multi_turn: MultiTurn = "per_turn"
    """per_turn: each assistant turn is an example with its history; whole: one example, all turns trained."""
    trained_turns: TrainedTurns = "all"
    """Turns of the assistant that are trained, if their flags allow it; last: only the last one of a row."""
    roles: dict[str, str] | None = None
    """More names of roles in the rows: {narrator: system}. Ours are system, user, assistant, tool (a function's result)
    and function_call (a call in the content)."""
    label_field: str | None = None
    """Row field kept as the example's label (quality labels). Excludes data.labels."""
    labels: list[str] | str | None = None
    """One label for each entry of data.train, in their order, for all rows of its files. Excludes
    data.label_field."""
    skip_bad: bool = False
    """Drop and count bad rows instead of stopping with exit code 3."""
    exclude: str | None = None
    """File of training rows to leave out. A list: an id or file:line in each line. Or suspects.csv of `sftmix
    suspects`: the rows whose decision is drop."""
    duplicates: Literal["keep", "drop"] = "keep"
    """drop: leave out training rows whose turns and functions an earlier row has, before any are held out."""
    limit: int | None = None
    """At most this many training rows, the first after the held-out split, which stays as large; for text, windows."""
    cache_dir: str | None = None
    """Directory of the cache of tokenised rows. null: $SFTMIX_CACHE, or ~/.cache/sftmix."""

    def __setattr__(self, name: str, value: Any) -> None:
        """Make a list of a single name or number."""
        super().__setattr__(name, as_list(value) if name in _LISTS and value is not None else value)

    def problems(self) -> Iterator[str]:
        """Yield one sentence for each problem of these options, whatever the rest of a configuration."""
        yield from self._problems_of_files()
        for name, role in (self.roles or {}).items():
            if role not in ROLES.values():
                yield f"data.roles maps {name} to {role}; allowed: {', '.join(dict.fromkeys(ROLES.values()))}"
        yield from out_of_range("data", self, _DATA)
        for name in OF_CONVERSATIONS if self.format == TEXT else ():
            if (given := getattr(self, name)) != getattr(DataOptions, name):  # the class has the defaults
                yield f"data.{name} ({given}) and data.format text exclude each other: leave it out"
        if self.format == TEXT and self.label_field is not None and self.packing is not False:
            yield (
                f"data.label_field ({self.label_field}) and data.format text exclude each other, as a window holds "
                "several documents: leave it out, or set data.packing to false"
            )
        if problem := path_problem(cache := self.cache_dir or os.environ.get("SFTMIX_CACHE", "")):
            yield f"data.cache_dir, or $SFTMIX_CACHE: {cache!r} cannot be the directory of the cache: it {problem}"

    def _problems_of_files(self) -> Iterator[str]:
        """Yield a sentence if a file of rows is missing, has no name, no label, or is trained on and held out."""
        train, held_out, labels = (getattr(self, name) for name in _LISTS)
        if not train:
            yield "data.train is missing: name the training rows, --data.train FILE (a file, directory or hub id)"
        for key, names in (("train", train), ("eval", held_out or [])):
            if any(not name.strip() for name in names):  # "$ROWS" unset: as a path, the working directory
                yield f"data.{key} has an empty name ({names}): name a file, directory or hub id (an unset variable?)"
        if held_out is not None and self.eval_fraction is not None:
            yield (
                f"data.eval ({', '.join(held_out)}) and data.eval_fraction ({self.eval_fraction}) exclude each other: "
                "held-out rows come from files of their own or from the training rows; set one to null"
            )
        if held_out == []:
            yield "data.eval is an empty list: name files of held-out rows, or null for none"
        if shared := sorted(set(train) & set(held_out or ())):
            yield f"data.train and data.eval both name {', '.join(shared)}: held-out rows must not be trained on"
        if labels is not None and self.label_field is not None:
            yield (
                f"data.labels ({', '.join(labels)}) and data.label_field ({self.label_field}) exclude each other: "
                "a label comes from the row's file or from a field of the row; set one to null"
            )
        if labels is not None and len(labels) != len(train):
            yield (
                f"data.labels has {len(labels)} values {labels} for {len(train)} entries of data.train {train}; give "
                "one for each, in their order"
            )
