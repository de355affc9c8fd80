"""Directories of rows: of save_to_disk, downloaded from the hub, or with files for training and for tests."""

import os
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest

from sftmix.data.sources import expand
from sftmix.words.errors import DataError


@pytest.fixture(autouse=True)
def quiet(tmp_path, monkeypatch) -> None:
    """datasets keeps its locks in a directory of the test's own, and shows no bars; the test stands in `tmp_path`."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub-cache")
    datasets.disable_progress_bars()
    monkeypatch.chdir(tmp_path)


def rows_of(tag: str, count: int = 2) -> list[dict]:
    """Rows with ids that begin anew in each file."""
    return [{"id": str(i), "prompt": f"Say {tag}{i}.", "completion": f"{tag}{i}"} for i in range(count)]


def table_of(tag: str, count: int = 2) -> datasets.Dataset:
    return datasets.Dataset.from_list(rows_of(tag, count))


@pytest.fixture
def said() -> Callable[..., list[str]]:
    """Function: the answers of a name's rows, in their order."""

    def answers(name: str, option: str = "data.train") -> list[str]:
        return [row["completion"] for source in expand([name], option)[0] for _, row in source.rows()]

    return answers


# ------------------------------------------------------------------------------------------- save_to_disk


def test_a_saved_dataset_is_what_it_was_saved_as(said):
    """Neither shards of an earlier save, which stay behind, nor what map() has kept are rows of it."""
    table_of("old", 4).save_to_disk("saved", num_shards=2)
    table_of("new", 3).with_format("numpy", columns=["prompt"]).save_to_disk("saved", num_shards=1)
    Path("saved/cache-0123.arrow").write_bytes(Path("saved/data-00000-of-00002.arrow").read_bytes())
    assert said("saved") == said("saved/data-00000-of-00001.arrow") == ["new0", "new1", "new2"]
    (line,) = expand(["saved"], "data.train")[1]
    assert line == (
        "data.train: read: 'saved/data-00000-of-00001.arrow'; left out of saved: 'data-00000-of-00002.arrow', "
        "'data-00001-of-00002.arrow'"
    )


def test_a_shard_that_is_gone_is_named_and_so_is_a_state_that_datasets_did_not_write(said, write):
    table_of("row", 4).save_to_disk("saved", num_shards=2)
    Path("saved/data-00001-of-00002.arrow").unlink()
    with pytest.raises(DataError, match=r"saved/state\.json names 'data-00001-of-00002\.arrow', not there; bring it"):
        said("saved")
    for state in ("{}", "[]", "not JSON", '{"_data_files": [{}]}', '{"_data_files": 7}', "[" * 100_000):
        write("saved/state.json", state)
        with pytest.raises(DataError, match=r"saved/state\.json is not as save_to_disk of datasets writes it \("):
            said("saved")


def test_shards_keep_their_order(said):
    table_of("row", 30).save_to_disk("many", num_shards=12)
    assert said("many") == [f"row{i}" for i in range(30)]


def test_both_sides_of_a_run_are_the_folders_of_one_directory(read):
    """Held-out rows are grouped by the names of data.eval, with which the names of their files begin."""
    sides = {side: table_of(side) for side in ("train", "validation", "test")}
    datasets.DatasetDict(sides).save_to_disk("all")
    prepared = read("all/train", eval=["all/validation", "all/test"], columns={"id": None})
    assert prepared.train.values("source") == [f"all/train/data-00000-of-00001.arrow[{i}]" for i in range(2)]
    assert [place.split("/")[1] for place in prepared.eval.values("source")] == ["validation"] * 2 + ["test"] * 2
    assert [line.partition(":")[0] for line in prepared.report.notes] == ["data.train", "data.eval", "data.eval"]


# ------------------------------------------------------------------------------------ snapshots of the hub


def test_the_folder_of_a_snapshot_is_named_and_no_card_is_asked(said, write, tmp_path):
    """Shards as `push_to_hub` lays them out; a README.md, which may name what it likes, is not read."""
    Path("snap/data").mkdir(parents=True)
    for tag, name in (("a", "train-00000-of-00002"), ("b", "train-00001-of-00002"), ("t", "test-00000-of-00001")):
        table_of(tag).to_parquet(f"snap/data/{name}.parquet")
    write("snap/README.md", "---\nconfigs: [{config_name: x, data_files: https://example.org/x.jsonl}]\n---\n")
    (tmp_path / "link").symlink_to("snap")
    for name in ("snap/data", f"{tmp_path}/link/data", "./snap/data"):
        assert said(name) == ["a0", "a1", "b0", "b1"]
    (line,) = expand(["snap/data"], "data.train")[1]
    assert line.endswith("left out of snap/data: 'test-00000-of-00001.parquet'")
    with pytest.raises(DataError, match=r"^data.train: snap: no file in the directory is read .*'data/test-00000"):
        expand(["snap"], "data.train")


# ------------------------------------------------------------------------------- training and test files


@pytest.mark.parametrize(
    "name", ["test", "my_eval", "validation-2", "alpaca.dev", "VAL", "squad_testing", "rows-valid", "evaluation"]
)
def test_files_for_tests_are_left_out_beside_others(name, said, write):
    Path("rows").mkdir()
    for tag in ("train", name, "contest", "devices", "interval"):
        write(f"rows/{tag}.jsonl", rows_of(tag, 1))
    assert said("rows") == ["contest0", "devices0", "interval0", "train0"]
    assert expand(["rows"], "data.train")[1][0].endswith(f"; left out of rows: '{name}.jsonl'")
    assert said(f"rows/{name}.jsonl") == [f"{name}0"]
    assert f"{name}0" in said("rows", option="data.eval")  # held-out rows, and prompts, may well be those


def test_files_for_tests_alone_are_read(said, write):
    Path("rows").mkdir()
    write("rows/test.jsonl", rows_of("test", 1))
    assert said("rows") == ["test0"]


def test_notes_do_not_stand_in_for_rows(said, write):
    """Beside LICENSE.txt, which is no file of rows, those for tests are still all there are."""
    Path("rows").mkdir()
    write("rows/test.jsonl", rows_of("test", 1))
    write("rows/LICENSE.txt", "Do as you like.")
    assert said("rows") == ["test0"]


def test_names_that_begin_as_those_of_datasets_and_linked_folders(said, write):
    """The files are rows; what is behind the link is not looked at, and its name is said."""
    for name in ("state", "dataset_info", "cache-1.arrow"):
        Path("rows").mkdir(exist_ok=True)
        write(f"rows/{name}.jsonl", rows_of(name[0], 1))
    Path("other").mkdir()
    write("other/b.jsonl", rows_of("b", 1))
    Path("rows/more").symlink_to("../other")
    Path("rows/sub").mkdir()
    Path("rows/sub/more").symlink_to("../../other")
    assert said("rows") == ["c0", "d0", "s0"]
    assert expand(["rows"], "data.train")[1][0].endswith("; left out of rows: 'more', 'sub/more'")


def test_what_is_left_out_is_named_and_what_is_hidden_is_none(said, write):
    for folder in ("rows/.git", "rows/more", "rows/x.jsonl"):
        Path(folder).mkdir(parents=True)
    write("rows/a.jsonl", rows_of("a", 1))
    write("rows/._a.jsonl", b"\0\5\26\7")
    write("rows/state.json", "{}")
    Path("rows/state.json").rename("rows/dataset_info.json")
    write("rows/notes.txt", "About these rows.")
    write("rows/more/b.csv", "prompt,completion\np,b\n")
    assert said("rows") == ["a0"]
    assert expand(["rows"], "data.train")[1] == [
        "data.train: read: 'rows/a.jsonl'; left out of rows: 'more/b.csv', 'notes.txt'"
    ]


def test_what_cannot_be_read_is_named_as_well(said, write):
    Path("rows/more.jsonl").mkdir(parents=True)
    for name in ("a.jsonl", "b.jsonl.gz", "c.tsv", "d.ndjson", "README.md", ".hidden"):
        write(f"rows/{name}", rows_of(name, 1) if name == "a.jsonl" else "text")
    os.mkfifo("rows/e.jsonl")
    write("rows/more.jsonl/f.tsv", "text")
    assert said("rows") == ["a.jsonl0"]
    assert expand(["rows"], "data.train")[1] == [
        "data.train: read: 'rows/a.jsonl'; left out of rows: 'b.jsonl.gz', 'c.tsv', 'd.ndjson', 'e.jsonl'"
    ]
    Path("rows/a.jsonl").unlink()
    with pytest.raises(DataError, match=r"rows: no file in the directory is read .*; there are 'b.jsonl.gz'"):
        expand(["rows"], "data.train")


def test_a_link_to_nothing_is_refused(said, write):
    """As in a cache of the hub that was cleared."""
    Path("rows").mkdir()
    write("rows/a.jsonl", rows_of("a", 1))
    Path("rows/notes.md").symlink_to("blobs/1")
    assert said("rows") == ["a0"]
    Path("rows/b.parquet").symlink_to("blobs/2")
    with pytest.raises(DataError, match=r"^rows/b.parquet: a link to blobs/2, which is not there; bring it back, or"):
        expand(["rows"], "data.train")


def test_a_split_of_a_file_is_no_file(write):
    path = write("rows.jsonl", rows_of("a"))
    with pytest.raises(DataError, match=r"rows.jsonl@test: .*rows.jsonl is on this disk, and only hub ids take"):
        expand([f"{path}@test"], "data.train")
