"""What is kept of a study with many small files, in one: FOLDER/files.parquet, a line for each file.

python benchmarks/evidence/packed.py pack FOLDER       the files of FOLDER but its scores go into files.parquet
python benchmarks/evidence/packed.py unpack FOLDER     and out of it again

file     its path in FOLDER: runs/NTP-seed-1.json, losses/NTP-seed-1.parquet
text     of JSON; null for a table
COLUMN   of a table, the list of its values: id, n_tokens, last_nll_sum, ...; null: the file has no such column
"""

import argparse
import atexit
import shutil
import sys
import tempfile
from functools import cache
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.evidence.losses import _write as write_parquet  # noqa: E402
from sftmix.disk.files import placing  # noqa: E402

NAME = "files.parquet"
SCORES = "scores"
"""Folder that stays as it is: runs read its files by their names."""


def pack(folder: Path) -> None:
    """Put the files of a folder into one, in one step, and remove them."""
    if (folder / NAME).exists():
        sys.exit(f"error: {folder / NAME} is there already; unpack it first, so that what is in it is packed again")
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.parent.name != SCORES)
    lines, types = list[dict[str, object]](), {"file": pa.string(), "text": pa.string()}
    for file in files:
        line: dict[str, object] = {"file": file.relative_to(folder).as_posix()}
        if file.suffix == ".parquet":
            table = pq.read_table(file)
            line |= {name: table[name].to_pylist() for name in table.column_names}
            types |= {column.name: pa.list_(column.type) for column in table.schema}
        else:
            line["text"] = file.read_text(encoding="utf-8")
        lines.append(line)
    with placing(folder / NAME) as staging:
        pq.write_table(pa.Table.from_pylist(lines, schema=pa.schema(list(types.items()))), staging, compression="zstd")
    for file in files:
        file.unlink()
    for place in {file.parent for file in files} - {folder}:
        place.rmdir()


def unpack(folder: Path, to: Path) -> None:
    """Write the files that are in one into a folder."""
    table = pq.read_table(folder / NAME)
    for line in table.to_pylist():
        file = to / line.pop("file")
        file.parent.mkdir(parents=True, exist_ok=True)
        if (text := line.pop("text")) is not None:
            file.write_text(text, encoding="utf-8")
        else:
            there = {name: values for name, values in line.items() if values is not None}
            types = {name: table.schema.field(name).type.value_type for name in there}
            write_parquet(file, **{name: pa.array(values, types[name]) for name, values in there.items()})


@cache
def whole(folder: Path) -> Path:
    """Return a folder with all files of a study: itself, or a temporary one of what is packed and what is beside."""
    if not (folder / NAME).exists():
        return folder
    place = Path(tempfile.mkdtemp(prefix=f"{folder.name}-"))
    atexit.register(shutil.rmtree, place)
    unpack(folder, place)
    for file in folder.rglob("*"):
        if file.is_file() and file.name != NAME:
            link = place / file.relative_to(folder)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(file.resolve())
    return place


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["pack", "unpack"])
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    if options.what == "pack":
        pack(options.folder)
    else:
        unpack(options.folder, options.folder)
        (options.folder / NAME).unlink()


if __name__ == "__main__":
    main()
