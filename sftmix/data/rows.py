"""Rows -> checked conversations (or documents) with ids, for training and held out; and the report on them.

Which rows: some of each source (data.take), without those of a list (data.exclude), held out or not. No tokenizer or
model is needed.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import pyarrow as pa

from sftmix.common.errors import ConfigError, DataError, refuse
from sftmix.common.files import decoded, place_of
from sftmix.common.plain import SHOWN_FIELDS, as_list, listed
from sftmix.common.progress import progress_bar
from sftmix.common.rng import stable_hash
from sftmix.common.shown import as_lines, counted, quoted
from sftmix.data.formats import RESERVED_ID, TEXT, Columns, convert
from sftmix.data.sources import expand, holds_text
from sftmix.data.store import (
    AT_ONCE,
    EXAMPLE,
    Conversations,
    Record,
    content_hash,
    get_or_build,
    key_of,
    short_hash,
    stored,
    write_rows,
)
from sftmix.data.thoughts import thinks
from sftmix.data.values import BadRow
from sftmix.options import DataOptions
from sftmix.types import Example, Int64

SCHEMA = pa.schema([*EXAMPLE, ("content", pa.uint64())])
"""Examples with the hash of their content."""

DOCUMENTS_AT_ONCE = 16
"""Documents that are in memory until they are written; each may have 64 MiB."""

SHOWN = 20
"""Bad rows that an error message lists."""

NAMED = 5
"""Cases of each reason that the report names; the others are counted."""

MAX_OTHER_PROMPTS = 0.05
"""Largest share of the training examples that may stand behind another prompt than the exported template's."""

REASONS = {
    "bad_row": "bad row{s} skipped (data.skip_bad)",
    "excluded": "row{s} left out (data.exclude)",
    "duplicate": "row{s} with the same content as an earlier row (kept, with #k at the end of the id)",
    "thought": "row{s} with a thought before the answer (data.thoughts)",
    "empty_response": "empty response{s} dropped",
    "unanswered": "last turn{s} without an answer, dropped",
    "empty_document": "empty document{s} dropped",
    "no_target": "window{s} dropped: no token there that one before it predicts",
    "no_response_token": "example{s} dropped: no response token left within data.max_length = {length}",
    "template_refused": "example{s} dropped: the chat template refuses the conversation",
    "tools_lost": "example{s} dropped: the chat template does not write the functions, or a function's result",
    "calls_lost": "example{s} dropped: the chat template does not write a call of a function as the row has it",
    "prefix_mismatch": "example{s} dropped: the prompt's tokens are not where the example's tokens begin",
    "no_end_of_turn": "example{s} dropped: the rendered response does not end with a stop token",
    "truncated": "example{s} cut at data.max_length = {length} (trained without an end-of-turn token)",
    "boundary": "example{s} with a response tokenised apart from the prompt (a token would span both)",
    "composed": "example{s} with a response that we put behind the prompt (the template leaves out a part of it, or "
    "does not go on from its own prompt)",
    "turn_lost": "example{s} with a turn that the chat template leaves out of the prompt",
    "other_prompt": "example{s} trained behind another prompt than the exported template's generation prompt",
    "weighted": "example{s} with a weight other than 1 (the field weight of the row, of a turn, or of a part)",
    "split_turns": "conversation{s} trained as one example per turn (no one sequence holds the prompt of every turn)",
    "split_alone": "conversation{s} not scored: split by this template, not by the target's (with data.multi_turn "
    "per_turn all templates give the same examples)",
    "spelt_special": "example{s} with the spelling of a special token, encoded as text (data.special_tokens)",
    "spelt_in_document": "document{s} with the spelling of a special token, encoded as text (data.special_tokens)",
    "eval_in_train": "held-out row{s} with content that also occurs in the training rows",
}
"""Every reason that the report counts, with its words there; {s} is the plural, {length} data.max_length."""


@dataclass
class DataReport:
    """Counts over the rows of one data set.

    rows          rows read from all files, with the bad ones; for text: documents
    train, eval   examples of each side (a row of k assistant turns gives up to k); for text: windows
    counts        reason (a key of REASONS) -> how many
    first         reason -> the first NAMED of them, as `id (source)` or `source: reason`
    notes         remarks, for example on the template in use
    max_length    tokens per example
    tokens        for text: the tokens of each side; else None
    """

    rows: int = 0
    train: int = 0
    eval: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    first: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    max_length: int | None = None
    tokens: tuple[int, int] | None = None

    def add(self, reason: str, *names: str, count: int = 1) -> None:
        """Count cases of `reason`, and keep the first names of all."""
        self.counts[reason] = self.counts.get(reason, 0) + count
        self.first[reason] = [*self.first.get(reason, []), *names][:NAMED]

    def take(self, other: Self) -> None:
        """Add the rows, counts and notes of another."""
        self.rows += other.rows
        self.notes += other.notes
        for reason, count in other.counts.items():
            self.add(reason, *other.first[reason], count=count)

    def to_dict(self) -> dict[str, Any]:
        """The report in types that JSON can write; `DataReport(**d)` reads it back."""
        return asdict(self)

    def lines(self) -> list[str]:
        """The report for people, one line per fact; what comes from rows and templates cannot add one."""
        kind, examples = "row", "examples"
        if self.tokens is not None:
            kind, sizes = "document", "{:,} and {:,} tokens".format(*self.tokens)
            examples = f"windows of at most {self.max_length:,} tokens ({sizes})"
        sides = f"{self.train:,} training and {self.eval:,} held-out {examples}"
        lines = [*self.notes, f"{counted(self.rows, kind)} read: {sides}"]
        for reason, text in REASONS.items():
            if count := self.counts.get(reason):
                text = text.format(s="" if count == 1 else "s", length=self.max_length)
                names = self.first[reason] + ["..."] * (count > NAMED)
                lines.append(f"{count:,} {text}: {', '.join(names)}")
        return [as_lines(line, but="") for line in lines]


class Prepared(NamedTuple):
    """Checked rows, ready to be tokenised any number of times by `sftmix.data.encode`.

    train, eval  the two sides; eval is None without held-out rows
    report       rows read, dropped and named so far
    options      the options under which the rows were read
    thinks       some training row has a thought
    """

    train: Conversations
    eval: Conversations | None
    report: DataReport
    options: DataOptions
    thinks: bool = False

    @property
    def text(self) -> bool:
        """The rows are documents of plain text."""
        return self.train.is_text


def prepare(options: DataOptions, seed: int, *, progress: bool = True) -> Prepared:
    """Read, check and number all rows, and decide which are held out (by data.seed, or else by `seed`).

    Raises ConfigError for options that exclude each other. Raises DataError for a file that cannot be read, and for bad
    rows unless data.skip_bad is set: the message counts them and lists `file:line: reason` of the first.
    """
    refuse(list(options.problems()), "the options of the rows")
    train, report, written = _read("data.train", options, progress)
    thinking = "thought" in report.counts
    if options.packing and not train.is_text:
        raise ConfigError("data.packing true is for plain text: conversations are never packed; set it to null")
    of_conversations = ["template", "multi_turn", "trained_turns", "roles", "labels", "num_proc"]
    if options.packing is not False:  # a window holds several documents
        of_conversations.append("label_field")
    for name in of_conversations if train.is_text else ():
        if (value := getattr(options, name)) not in (None, "per_turn", "all"):
            raise ConfigError(
                f"data.{name} ({value}) and data.format text exclude each other: leave it out; data.label_field needs "
                "data.packing false"
            )
    seed = seed if options.seed is None else options.seed
    if options.take is not None:
        train = take(train, options, written, seed, report)
    if options.exclude is not None:
        train = exclude(train, options.exclude, report)
    held_out = None
    if options.eval is not None:
        held_out, more, _ = _read("data.eval", options, progress)
        report.take(more)
        if train.is_text != held_out.is_text:
            raise DataError("data.train or data.eval holds plain text, the other conversations: a run takes one kind")
    elif options.eval_fraction is not None:
        train, held_out = divide(train, options.eval_fraction, seed, report)
    limit = options.limit
    # For text, data.limit counts windows; these are cut later, from the tokens.
    if limit is not None and not train.is_text and len(train.records) > limit:
        report.notes.append(f"{len(train.records) - limit:,} training rows left out (data.limit)")
        train = train.some(train.records[:limit])
    # Parts of the same documents are on both sides on purpose.
    if held_out is not None and train.parts is None:
        hashes, trained = (np.array(side.values("content"), dtype=np.uint64) for side in (held_out, train))
        for example in held_out.read(held_out.records[np.isin(hashes, trained)]):
            report.add("eval_in_train", f"{example.id} ({example.source})")
    return Prepared(train, held_out, report, options, thinking)


# ------------------------------------------------------------------------------------------ reading rows


def _read(option: str, options: DataOptions, progress: bool) -> tuple[Conversations, DataReport, list[int]]:
    """Checked rows of data.train or data.eval; from the cache if the files and the options are the same as before.

    Returns them with the report and the number of records of each name.
    """
    train = option == "data.train"
    names = as_list(options.train if train else options.eval)
    labels, label_field = (options.labels, options.label_field) if train else (None, None)  # held-out rows need none
    sources, lines = expand(names, option, options.format)
    columns = Columns(options.columns)
    label_field = next((ours for ours, column in columns.names.items() if column == label_field), label_field)
    is_text = holds_text(sources, options.format, option, columns)
    form = TEXT if is_text else options.format
    marks = [labels[source.entry] for source in sources] if labels else label_field
    last = options.trained_turns == "last"
    content = [[source.digest for source in sources], form, marks, options.columns, options.roles, last]
    places = [(source.name, source.entry) for source in sources]  # a directory's files have the names of files
    key = key_of("rows", content, places, options.skip_bad)

    def build(directory: Path) -> Record:
        report, written, bad = DataReport(), [0] * len(names), list[str]()
        times = Counter[str]()  # how often each id came before
        unread = Counter[str]()

        def records() -> Iterator[Record]:
            """Make the records of all sources; count the rows, and name those that are none."""
            for source in sources:
                label = labels[source.entry] if labels else None
                for place, value in source.rows():
                    report.rows += 1
                    bar.update()
                    try:
                        row = columns.renamed(value)
                        example = convert(
                            row, form, columns.formats, place, label, label_field, unread, options.roles, last
                        )
                        record = _record(example, report, times)
                        if record is not None and thinks(example):
                            report.add("thought", place)
                    except BadRow as problem:
                        report.add("bad_row", f"{place}: {problem}")
                        bad.append(f"{place}: {problem}")
                        del bad[SHOWN:]
                        continue
                    if record is not None:
                        written[source.entry] += 1
                        yield record

        with progress_bar("Reading rows", unit=" rows", delay=1, enabled=progress) as bar:
            count = write_rows(directory / "rows.arrow", SCHEMA, records(), DOCUMENTS_AT_ONCE if is_text else AT_ONCE)
        if train and columns.present:
            _check_present(columns, options.label_field)
        if bad and not options.skip_bad:
            problem = f"{counted(report.counts['bad_row'], 'bad row')} (data.skip_bad drops and counts them):"
            raise DataError("\n".join([problem, *bad]))
        if not count:
            raise DataError("\n".join([f"{option}: no usable row is left", *report.lines()]))
        if unread:
            most = ", ".join(f"{name} ({counted(n, 'row')})" for name, n in unread.most_common(SHOWN_FIELDS))
            report.notes.append(f"{option}: {counted(len(unread), 'field')} not read: {most}")
        return {"report": report.to_dict(), "written": written}

    directory, summary = get_or_build(options.cache_dir, f"rows-{key}", build)
    report = DataReport(**summary["report"])
    report.notes[:0] = lines
    return Conversations(directory, key_of("rows", content), key, is_text), report, summary["written"]


def _check_present(columns: Columns, label_field: str | None) -> None:
    """Raise DataError for a field that options name, and no row has."""
    for name, column in {**columns.names, "the label": label_field}.items():
        if column is not None and column not in columns.present:
            raise DataError(
                f"data.columns, data.label_field: no row of data.train has the field {column!r} (for {name}); the "
                f"fields there are {listed(columns.present)}"
            )


def _record(example: Example, report: DataReport, times: Counter[str]) -> Record | None:
    """Return the record of a row, None for one without any response; count empty responses and repeated rows.

    Its id is its own, or a hash of its content with `#k` for the k-th repetition. Raises BadRow for an own id that an
    earlier row has.
    """
    texts = [turn.content for turn in example.messages if turn.trained and not turn.more.get("tool_calls")]
    is_text = example.messages[0].role == TEXT
    for text in texts:
        if not text.strip():
            report.add("empty_document" if is_text else "empty_response", example.source)
    if example.messages[-1].role in ("user", "tool"):
        report.add("unanswered", example.source)
    if not any(turn.trained and (turn.content.strip() or turn.more.get("tool_calls")) for turn in example.messages):
        return None
    content = short_hash(texts[0].encode()) if is_text else content_hash(example.messages)
    name = example.id or content
    repeats = times[name]
    times[name] += 1
    if repeats:
        if example.id:
            raise BadRow(f"the id {quoted(name)} is taken by an earlier row; data.columns '{{id: null}}' reads no ids")
        name += f"#{repeats}"
        report.add("duplicate", f"{name} ({example.source})")
    return stored(replace(example, id=name)) | {"content": int(content, 16)}


# -------------------------------------------------------------------------------------------- which rows


def take(
    rows: Conversations, options: DataOptions, written: Sequence[int], seed: int, report: DataReport
) -> Conversations:
    """Take some rows of each entry of data.train, those with the smallest hash of (seed, id); a note counts them.

    written  records of each entry, which stand one after the other
    Raises ConfigError for more rows than there are, and for a share that is no row.
    """
    chosen, notes = [], []
    entries = np.split(rows.records, np.cumsum(written)[:-1])
    for size, name, records in zip(as_list(options.take), as_list(options.train), entries, strict=True):
        total = len(records)
        count = total if size is None else size if isinstance(size, int) else round(size * total)
        if size is not None and not 1 <= count <= total:
            raise ConfigError(
                f"data.take {size} of {name} is {count:,} of {total:,} usable rows; name a number from 1 to "
                f"{total:,}, or null for all of them"
            )
        chosen.append(_drawn(rows.some(records), count, seed, "take"))
        notes.append(f"{count:,} of {total:,} from {name}")
    report.notes.append(f"rows taken (data.take): {', '.join(notes)}")
    return rows.some(np.concatenate(chosen))


def exclude(rows: Conversations, path: str, report: DataReport) -> Conversations:
    """Leave out the rows that a file names, one in each line: an id, that of a turn, too, or `file:line`.

    Raises ConfigError for a file that cannot be read, and for a name that is no row's.
    """
    try:
        lines = decoded(place_of(path).read_bytes()).split("\n")
    except (OSError, ValueError) as error:
        raise ConfigError(f"data.exclude: {path} cannot be read: {error}") from error
    names = {RESERVED_ID.sub("", line.strip()) for line in lines} - {""}
    known = list(zip(rows.values("id"), rows.values("source"), strict=True))
    if unknown := sorted(names.difference(*known)):
        raise ConfigError(
            f"data.exclude: {path} names {len(unknown):,} that are no rows of data.train, such as "
            f"{quoted(unknown[0])}; give an id or file:line in each line, as `sftmix suspects` shows them"
        )
    remaining = np.array([names.isdisjoint(pair) for pair in known])
    for k in np.flatnonzero(~remaining):
        report.add("excluded", f"{known[k][0]} ({known[k][1]})")
    return rows.some(rows.records[remaining])


def divide(rows: Conversations, fraction: float, seed: int, report: DataReport) -> tuple[Conversations, Conversations]:
    """Divide rows into (training side, held-out side): whole rows by their hash, or the last part of each document.

    With fewer than 2 / fraction documents, about the last part of each is held out, behind the next newline, if there
    is one. Windows from inside a document are not: the model would be tested on text that stands between trained text.
    """
    total = len(rows.records)
    if not rows.is_text or total * fraction >= 2:
        count = max(1, round(fraction * total))
        if count >= total:
            raise ConfigError(f"data.eval_fraction = {fraction} of {total} rows leaves no training row")
        chosen = _drawn(rows, count, seed, "held out")
        return rows.some(np.setdiff1d(rows.records, chosen, assume_unique=True)), rows.some(chosen)
    report.notes.append(
        f"{total:,} documents are too few to hold out whole ones: the last {fraction:.2%} of each is held "
        "out (it goes on where training stops, so its loss says little about other texts)"
    )
    bounds = []
    for _, text, *_ in rows.documents():
        place = round((1 - fraction) * len(text))
        after = text.find("\n", place) + 1
        bounds.append((0, after if 0 < after < len(text) else place, len(text)))
    sides, cuts = [], np.array(bounds, dtype=np.int64).reshape(-1, 3)
    for parts in (cuts[:, :2], cuts[:, 1:]):
        some = parts[:, 0] < parts[:, 1]  # of a document of a few characters one part is empty
        sides.append(rows.some(rows.records[some], parts[some]))
    return sides[0], sides[1]


def _drawn(rows: Conversations, count: int, seed: int, purpose: str) -> Int64:
    """Choose `count` of the records, those with the smallest hash of (seed, purpose, id); in file order."""
    if count == len(rows.records):
        return rows.records
    hashes = np.fromiter((stable_hash(seed, purpose, name) & (2**64 - 1) for name in rows.values("id")), np.uint64)
    return np.sort(rows.records[np.argsort(hashes, kind="stable")[:count]])
