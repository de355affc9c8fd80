"""Columns of images and sound, and descriptions of directories: nothing that a row or a README names is opened."""

import socket

import pyarrow as pa
import pytest
from datasets import Audio, Features, Image, Json, List, Value
from pyarrow import parquet

from sftmix.data.sources import expand
from sftmix.disk.files import write_json
from sftmix.words.errors import DataError

NAMED = ["http://127.0.0.1:9/x.png", "/etc/hostname"]
TEXT = Value("string")


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)

    def refuse(*_):
        raise AssertionError("something was fetched")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("kind", [Image, Audio])
@pytest.mark.parametrize("form", ["save_to_disk", "arrow", "parquet", "json"])
def test_media_stay_as_they_are_written(name, kind, form, tmp_path):
    media, nested = {"bytes": None, "path": name}, [{"picture": {"bytes": None, "path": name}}]
    features = Features({"completion": TEXT, "media": kind(), "nested": List({"picture": kind()})})
    if form == "json":  # a table with values of JSON is read by datasets as well
        features["more"] = Json()
    row = {"completion": "b", "media": media, "nested": nested, "more": '{"x": [1]}'}
    # datasets itself would open the files while it writes them.
    schema = features.arrow_schema
    stored = zip(features, schema.types, strict=True)
    columns = [pa.array([row[column]], getattr(dtype, "storage_type", dtype)) for column, dtype in stored]
    table = pa.Table.from_arrays(columns, schema=schema)
    place = {"save_to_disk": "rows", "arrow": "rows/data.arrow"}.get(form, "rows.parquet")
    if form in ("save_to_disk", "arrow"):
        (tmp_path / "rows").mkdir()
        with pa.OSFile("rows/data.arrow", "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table)
        names = ("_format_columns", "_format_type", "_output_all_columns", "_split")
        files = {"_fingerprint": "f", "_data_files": [{"filename": "data.arrow"}]}
        write_json(tmp_path / "rows" / "state.json", {**dict.fromkeys(names), "_format_kwargs": {}, **files})
        write_json(tmp_path / "rows" / "dataset_info.json", {"features": features.to_dict()})
    else:
        parquet.write_table(table, place)
    ((source,), _) = expand([place], "data.train")
    ((_, found),) = source.rows()
    assert found["media"] == media
    assert found["nested"] == nested
    if form == "json":
        assert found["more"] == {"x": [1]}


@pytest.mark.parametrize(
    "named",
    [
        "data_files: http://127.0.0.1:9/rows.jsonl",
        "data_files: [{split: train, path: [rows.jsonl, '../other.jsonl']}]",
        "data_files: {train: /etc/hostname}",
        "data_files: 'zip://x.jsonl::http://127.0.0.1:9/a.zip'",
        "data_dir: ../..",
    ],
)
@pytest.mark.parametrize("file", ["README.md", ".huggingface.yaml"])
def test_what_a_description_names_is_not_read(named, file, tmp_path):
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    fence = "---\n" if file == "README.md" else ""
    (tmp_path / "rows" / file).write_text(f"{fence}configs:\n- config_name: default\n  {named}\n{fence}")
    assert [source.name for source in expand(["rows"], "data.train")[0]] == ["rows/rows.jsonl"]
    with pytest.raises(DataError, match=r"rows@train: rows is on this disk, and only hub ids take a subset"):
        expand(["rows@train"], "data.train")
