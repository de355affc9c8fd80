"""A stage of one's own, as docs/new-stage.md has it: one file of the user's, and no edit of the package."""

import importlib
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sftmix.components import Online, RandomSplit
from sftmix.config import RunConfig
from sftmix.disk.files import read_json
from sftmix.options import TrainingOptions
from sftmix.pipeline.context import StageSpec
from sftmix.pipeline.recipe import run
from sftmix.pipeline.stages import SPLIT, STAGES
from sftmix.ranks.world import World
from sftmix.tools.verify.run import verify
from sftmix.tools.verify.window import window_of
from sftmix.words.errors import ConfigError
from tests.configs import read_config
from tests.faults.mines import KillAt, Record
from tests.forked import on_ranks
from tests.pipeline.test_identity import config, read_back
from tests.test_docs import ROOT, blocks
from tests.tiny import contents, status, table


@pytest.fixture
def clusters(tmp_path, monkeypatch):
    """The function `clusters` of the page, from a file that only the user has."""
    file, text = tmp_path / "clusters.py", blocks(ROOT / "docs" / "new-stage.md", "python")[0]
    file.write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("clusters", None)
    return importlib.import_module("clusters").clusters


def with_stage(own: StageSpec) -> Sequence[StageSpec]:
    """The stages of a run with one more, before the split."""
    before = STAGES.index(SPLIT)
    return [*STAGES[:before], own, *STAGES[before:]]


@pytest.fixture
def asked(finished, tmp_path) -> RunConfig:
    """A run of four steps whose split needs neither reference nor confidence."""
    return config(finished.tiny, tmp_path / "run", splitter=RandomSplit())


def test_a_stage_of_ones_own_is_made_and_read_back(clusters, asked, tmp_path, capsys, sftmix):
    """A command may end with it, and a later stage gets its value."""
    seen = []
    later = replace(SPLIT, make=lambda run, values: seen.append(values["clusters"]) or SPLIT.make(run, values))
    stages = [later if stage is SPLIT else stage for stage in with_stage(clusters(k=3))]
    directory = tmp_path / "run"
    summary = run(asked, until="clusters", stages=stages)
    made = table(directory / "clusters" / "clusters.parquet")
    assert [made["cluster"].count(k) for k in range(3)] == [10, 10, 9]
    assert summary["stages"]["clusters"].keys() == {"wall_seconds", "peak_memory_bytes"}
    assert read_json(directory / "clusters" / "figures.json")["clusters"] == 3
    assert (status(directory)["stage"], status(directory)["exit_code"]) == ("clusters", 0)
    assert re.search(r"^clusters: 3 of 29 rows \(\d+ s\)$", capsys.readouterr().out, re.M)
    before = contents(directory / "clusters")
    run(asked, until="split", stages=stages)
    assert read_back(capsys.readouterr().out) == ["clusters"]
    assert contents(directory / "clusters") == before
    np.testing.assert_array_equal(seen, [made["cluster"]])
    rows = re.findall(r"^\| (\w+) +\| done ", sftmix("status", str(directory)).out, re.M)
    assert rows == ["clusters", "split"]  # where it was made, and not last


def test_a_stage_of_ones_own_is_refused_with_other_inputs(clusters, asked, tmp_path):
    """Before any stage is made, and by the name of what differs."""
    run(asked, until="clusters", stages=with_stage(clusters(k=3)))
    before = contents(tmp_path / "run")
    with pytest.raises(ConfigError, match=r"run/clusters: was made with other inputs: k: 3 -> 4\. Use another --out"):
        run(asked, until="split", stages=with_stage(clusters(k=4)))
    (tmp_path / "rows.jsonl").write_bytes(Path(asked.data.train[0]).read_bytes().replace(b"a", b"b"))
    with pytest.raises(ConfigError, match="clusters: was made with other inputs: the training rows are others, as "):
        run(
            replace(asked, data=replace(asked.data, train=[str(tmp_path / "rows.jsonl")])),
            until="clusters",
            stages=with_stage(clusters(k=3)),
        )
    assert contents(tmp_path / "run") == before


def test_a_stage_of_ones_own_has_its_version_and_no_input_of_that_name(clusters, asked):
    """Another version is other inputs; an input "version" would have been in the place of the stage's own."""
    stage = clusters(k=3)
    run(asked, until="clusters", stages=with_stage(stage))
    with pytest.raises(ConfigError, match="this version of the stage makes other files of the same inputs"):
        run(asked, until="clusters", stages=with_stage(replace(stage, version=2)))
    named = replace(stage, inputs=lambda known: stage.inputs(known) | {"version": 7})
    with pytest.raises(ConfigError, match=r"stage clusters: version is no key of `inputs`; write StageSpec\(version"):
        run(asked, until="clusters", stages=with_stage(named))


def test_a_directory_with_the_name_of_a_stage_of_ones_own_is_not_written_to(clusters, asked, tmp_path):
    (tmp_path / "run" / "clusters").mkdir(parents=True)
    (tmp_path / "run" / "clusters" / "mine.txt").write_text("of somebody")
    with pytest.raises(ConfigError, match=r"out: no run wrote .*run/clusters"):
        run(asked, until="clusters", stages=with_stage(clusters(k=3)))
    run(asked, until="split")  # which has no such stage


def test_a_run_ends_with_a_stage_that_has_a_result(clusters, asked):
    with pytest.raises(ConfigError, match="until is 'clusters'; allowed: reference, confidence, split, train"):
        run(asked, until="clusters", stages=with_stage(replace(clusters(k=3), result="")))


def makes_clusters(world: World, place: str, out: str, fault: Record | KillAt | None) -> None:
    sys.path.insert(0, place)
    stage = importlib.import_module("clusters").clusters(k=3)
    asked = replace(read_config(Path(place) / "asked.yaml"), out=out)
    if fault:
        fault()
    run(asked, until="clusters", stages=with_stage(stage), world=world)


@pytest.mark.slow
@pytest.mark.long
def test_a_stage_of_ones_own_that_was_killed_goes_on_to_the_same_files(clusters, asked, tmp_path):
    """Before each of its file operations."""
    (tmp_path / "asked.yaml").write_text(asked.yaml())
    operations = tmp_path / "operations.txt"
    on_ranks(makes_clusters, str(tmp_path), str(tmp_path / "whole"), Record("/clusters/", str(operations)), ranks=1)
    whole = contents(tmp_path / "whole" / "clusters", but=["figures.json", "MANIFEST.json"])
    count = len(operations.read_text().splitlines())
    assert count > 10
    for number in range(1, count + 1, 3):
        out = tmp_path / f"killed-{number}"
        with pytest.raises(AssertionError, match=r"\[-9\]"):
            on_ranks(makes_clusters, str(tmp_path), str(out), KillAt("/clusters/", number), ranks=1)
        on_ranks(makes_clusters, str(tmp_path), str(out), None, ranks=1)
        assert contents(out / "clusters", but=["figures.json", "MANIFEST.json"]) == whole
        assert read_json(out / "clusters" / "MANIFEST.json")["files"].keys() == {"clusters.parquet", "figures.json"}


@pytest.mark.slow
def test_a_stage_of_ones_own_is_verified(clusters, asked, tmp_path, sftmix):
    """It is made again, and what it makes is compared with the run's; the command compares its hashes alone."""
    stage = clusters(k=3)
    run(replace(asked, callbacks=[]), stages=with_stage(stage))
    certificate = verify(window_of(tmp_path / "run"), with_stage(stage))
    notes = [finding["note"] for finding in certificate["findings"]]
    assert certificate["exact"]
    assert "clusters/clusters.parquet, id, cluster, bit for bit" in notes
    assert "options, seed, rows and model as clusters, split, train recorded" in notes
    other = replace(clusters(k=4), inputs=stage.inputs)
    different = [f["note"] for f in verify(window_of(tmp_path / "run"), with_stage(other))["findings"] if not f["same"]]
    assert any(note.startswith("clusters/clusters.parquet, cluster, ") for note in different)
    assert sftmix("verify", str(tmp_path / "run")).code == 0
    file = tmp_path / "run" / "clusters" / "clusters.parquet"
    file.write_bytes(file.read_bytes() + b"x")
    done = sftmix("verify", str(tmp_path / "run"))
    assert (done.code, "clusters.parquet does not have the hash it was written with" in done.out) == (4, True)


def test_a_single_run_makes_its_last_split_by_the_stages_it_was_given(finished, tmp_path):
    """A changed record in the place of the split is the one that is made after the training."""
    seen = []
    own = replace(
        SPLIT, make=lambda run, values: seen.append(values["confidence"]) or SPLIT.make(run, values), version=2
    )
    stages = [own if stage is SPLIT else stage for stage in STAGES]
    training = TrainingOptions(global_batch_size=8, micro_batch_size=4, epochs=2)
    asked = replace(config(finished.tiny, tmp_path / "run"), reference=Online(), training=training)
    run(asked, stages=stages)
    assert len(seen) == 1
    assert read_json(tmp_path / "run" / "split" / "inputs.json")["version"] == 2
