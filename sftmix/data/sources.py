"""Sources of rows: files, directories of these, and hub ids."""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from sftmix.components.row_format import RowFormat
from sftmix.data.row_files import MAX_ROW, READERS, SUPPORTED, Row, characters, rows_of_table
from sftmix.disk.hashes import sha256_file
from sftmix.disk.known import file_state
from sftmix.disk.places import HUB_ID, OutsideError, path_problem, place_of
from sftmix.disk.texts import read_text
from sftmix.words.errors import BadRow, DataError
from sftmix.words.fields import TEXT, listed
from sftmix.words.given import not_utf8

# "openai/gsm8k:main@test" -> openai/gsm8k, main, test; "C:\\rows.jsonl" is a name alone
_PARTS = re.compile(r"(.+?)(?::(?!\.+(?:@|\Z))([^@:/\\\x00-\x1f]+))?(?:@(?!\.)([\w.%:+()\[\] -]+))?\Z")
"""NAME:SUBSET@SPLIT, of which subset and split may be left out."""

# ._a.jsonl (macOS), cache-0123.arrow (of map), state.json, dataset_info.json
_NO_ROWS = re.compile(r"(\..*|cache-.*\.arrow|state\.json|dataset_(infos?|dict)\.json|README\.md)\Z", re.S)
"""Names of files that are never rows: hidden ones, and those that datasets and the hub write for themselves."""
# test-00000-of-00001, medqa_4options_test_800, alpaca.dev; not contest, latest, devices
_HELD_OUT = re.compile(r"(^|[\W_\d])(tests?|testing|evals?|evaluation|valid|validation|val|dev)([\W_\d]|$)", re.I)
"""Names of files that are not for training if there are others."""

_BINARY = re.compile(rb"(?=.*\0)(?!\xff\xfe|\xfe\xff).*[\x02-\x08\x0e-\x19]", re.S)
"""The beginning of what is no text: no mark of UTF-16, and both NUL and another character that texts do not have."""

_NO_FILE = (
    ": there is no such file, and as a Hugging Face hub id (NAME:SUBSET@SPLIT; without a network, name the data set's "
    "files) it cannot be loaded"
)


class Source(NamedTuple):
    """One file or hub dataset.

    name    as the user wrote it (inside a directory: the directory, as it was named, and the file's name)
    digest  sha256 of the file's bytes, or the fingerprint of the hub dataset
    data    path of the file, or the hub dataset's rows
    entry   place of the name in data.train that it belongs to
    state   of the file before its bytes were hashed (`file_state`)
    """

    name: str
    digest: str
    data: Any
    entry: int = 0
    state: Sequence[object] = ()

    def check_unchanged(self) -> None:
        """Raise DataError for a file that is another one than was hashed."""
        if isinstance(self.data, Path) and not (self.data.exists() and file_state(self.data) == self.state):
            raise DataError(f"{self.name} was changed while it was read; run again")

    def rows(self) -> Iterator[Row]:
        """Rows in file order, good and bad, under `file:line`; raises DataError if nothing more can be read."""
        reader = READERS[self.data.suffix.lower()] if isinstance(self.data, Path) else rows_of_table
        is_limited = reader is READERS[".txt"]  # by its own size
        with _reading(self.name):
            for place, row in reader(self.data):
                if not is_limited and (size := characters(row)) > MAX_ROW:
                    row = BadRow(f"a row of {size:,} characters; the limit is {MAX_ROW:,}: cut it into several")
                yield f"{self.name}{place}", row


@contextmanager
def _reading(name: str, problem: str = ": cannot be read") -> Iterator[None]:
    """Raise DataError for whatever readers raise: datasets has errors of many libraries, some of them pages long."""
    try:
        yield
    except (DataError, OutsideError):
        raise
    except BadRow as error:
        raise DataError(f"{name}{error}") from error
    except Exception as error:
        # strerror: the text of an OSError has the path once more; split: some go over several lines.
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())[:300] or type(error).__name__
        raise DataError(f"{name}{problem}: {reason}") from error


def expand(names: Sequence[str], option: str, form: RowFormat | str = "auto") -> tuple[list[Source], list[str]]:
    """Turn file names, directories and hub ids into sources, in the order given, and a line about each directory.

    A hub id may name a subset, a split or both, `openai/gsm8k:main`, `tatsu-lab/alpaca@train[:50%]`.

    option  name of the option that holds the names, for messages; in data.train alone, files for tests are left out
    form    a row format, or a word of data.format. Text files of a directory are documents if it is text, or if it is
            auto and the directory holds nothing else. Beside files of rows they are notes about the rows, and are left
            out.
    Raises DataError with the path that is missing, unreadable, empty or of an unknown kind.
    """
    sources, lines = list[Source](), list[str]()
    for entry, name in enumerate(names):
        with _reading(f"{option}: {name}"):
            files = _files(name, option, form, lines)
            for file, path in files.items():
                state = file_state(path)
                sources.append(Source(file, sha256_file(path), path, entry, state))
        if not files:
            with _reading(f"{option}: {name}", _NO_FILE):
                import datasets  # takes more than a second

                datasets.disable_progress_bars()  # ours count the rows
                place, subset, split = name_parts(name)
                dataset = datasets.load_dataset(place, subset, split=split or "train")
            sources.append(Source(name, str(dataset._fingerprint), dataset, entry))
    return sources, lines


def check_names(names: Sequence[str], option: str, form: RowFormat | str) -> None:
    """Raise the errors of `expand` that need no look at rows or at the hub; its arguments are the same."""
    for name in names:
        with _reading(f"{option}: {name}"):
            _files(name, option, form, [])


def _files(name: str, option: str, form: RowFormat | str, lines: list[str]) -> dict[str, Path]:
    """Return the files behind a name, by their names in messages; none for a hub id. Add a line about a directory."""
    place = name_parts(name)[0]
    path = place_of(name)
    files = {name: path}
    if path.is_dir():
        found, left = _in_directory(path, option, form)
        left_out = listed(str(file.relative_to(path)) for file in left)
        if not found:
            raise DataError(
                f"{option}: {name}: no file in the directory is read (ending in {SUPPORTED}); there are {left_out}; "
                "name files of rows, or their folders"
            )
        files = {str(Path(name) / file.name): file for file in found}
        lines.append(f"{option}: read: {listed(files)}; left out of {name}: {left_out}")
    elif not path.exists():
        if problem := _why_absent(place, path):
            raise DataError(f"{option}: {name}{problem}")
        return {}
    for file, path in files.items():
        if problem := not_utf8(file):
            raise DataError(f"{option} is {problem}")
        if problem := _why_unread(path):
            raise DataError(f"{file}{problem}")
    return files


def _why_absent(place: str, path: Path) -> str:
    """Return why a name without subset and split, for which there is no path, is no hub id; "" if it may be one."""
    if problem := path_problem(place):
        return f" {problem}, or a hub id"
    if re.search(r"[*?\[]", place):
        return " is a pattern, and only names are read: name the directory, or each file, '[a.jsonl, b.jsonl]'"
    if place_of(place).exists():  # datasets would read it, and whatever else its README.md names
        return f": {place} is on this disk, and only hub ids take a subset, a split or a part of one; name files alone"
    if HUB_ID.match(place) and path.suffix.lower() not in READERS:  # `rows.jsonl` could be both
        return ""
    return f": no such file or directory (looked for {path.absolute()}); name a file, a directory or a hub id"


def _why_unread(path: Path) -> str:
    """Return why a file is not read, by its name and its beginning; "" if it is."""
    ending = path.suffix.lower()
    if ending not in READERS:
        return f": files ending in {path.suffix or 'nothing'!r} are not read; use {SUPPORTED}"
    if not path.is_file():
        return ": no regular file, but a pipe or a device; write the rows into a file"
    if path.stat().st_size == 0:
        return ":1: the file is empty"
    with path.open("rb") as file:
        head = file.read(1024)
    if head.startswith(b"ARROW1"):
        return (
            ": an Arrow IPC file, of pyarrow.ipc.new_file; .arrow files are read as `datasets` writes them, as a "
            "stream: write the rows as Parquet, or by pyarrow.ipc.new_stream"
        )
    if ending not in (".arrow", ".parquet") and _BINARY.match(head):
        return f": binary, and no text; files ending in {ending} are text in UTF-8"
    return ""


def _in_directory(directory: Path, option: str, form: RowFormat | str) -> tuple[list[Path], list[Path]]:
    """Return the files in a directory that are read, and those that are left out: in it all, below it what could be."""
    here = [file for file in directory.iterdir() if not (file.is_dir() or _NO_ROWS.match(file.name))]
    every = [*directory.rglob("*")]
    below = [file for file in every if _is_rows(file) and file.is_file()]
    # rglob does not go into them
    linked = [file for file in every if file.is_symlink() and file.is_dir() and not _NO_ROWS.match(file.name)]
    _refuse_lost(filter(_is_rows, here))
    found = _saved(directory, sorted(file for file in below if file.parent == directory))
    rows = [file for file in found if file.suffix.lower() != ".txt"]
    if form != TEXT and (rows or form != "auto"):  # text beside rows is notes
        found = rows
    if option == "data.train":  # a directory with files for tests alone is meant as it is
        found = [file for file in found if not _HELD_OUT.search(file.stem)] or found
    return found, sorted({*here, *below, *linked}.difference(found))


def _saved(directory: Path, found: list[Path]) -> list[Path]:
    """Return the files that state.json of save_to_disk names, if there is one: those of an earlier save stay beside."""
    state = directory / "state.json"
    if not state.is_file():
        return found
    try:
        names = {str(file["filename"]) for file in json.loads(read_text(state))["_data_files"]}
    except (LookupError, TypeError, ValueError, RecursionError) as error:
        raise DataError(
            f"{state} is not as save_to_disk of datasets writes it ({type(error).__name__}: {error}); move it away if "
            "it is another program's"
        ) from error
    if lost := sorted(names - {file.name for file in found}):
        raise DataError(f"{state} names {listed(lost)}, not there; bring it back, or write the rows anew")
    return [file for file in found if file.name in names]


def _is_rows(file: Path) -> bool:
    """Return True for a file that is read, by its name."""
    return file.suffix.lower() in READERS and not _NO_ROWS.match(file.name)


def _refuse_lost(files: Iterable[Path]) -> None:
    """Raise DataError for a link to nothing."""
    for file in files:
        if file.is_symlink() and not file.exists():
            raise DataError(f"{file}: a link to {file.readlink()}, which is not there; bring it back, or delete it")


def name_parts(name: str) -> tuple[str, str | None, str | None]:
    """Take NAME:SUBSET@SPLIT apart; subset and split may be left out, as with a file or directory of that very name."""
    match = None if place_of(name).exists() else _PARTS.match(name)
    return (match[1], match[2], match[3]) if match else (name, None, None)
