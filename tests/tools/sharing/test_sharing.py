"""Cards of exports; scores come back from a hub, by the real client and a local stand-in of the hub's API."""

import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
from huggingface_hub import ModelCard

from sftmix.tools.sharing.cards import write_scores
from tests.tiny import ROOT, groups
from tests.tools.sharing.hub import Hub

pytestmark = pytest.mark.long

SCRIPT = """
import contextlib, io, json, sys
from sftmix.cli import main
for words in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = main(words)
    print(json.dumps([code, out.getvalue(), err.getvalue()]))
"""


def commands(*lines, url, home, offline="0"):
    """Run command lines in one process of its own, which asks the hub at `url`: (code, out, err) of each."""
    environment = {**os.environ, "HF_ENDPOINT": url, "HF_HOME": str(home), "HF_TOKEN": "hf_token"}
    environment |= {"HF_HUB_OFFLINE": offline, "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(ROOT)
    words = [sys.executable, "-c", SCRIPT, json.dumps([[str(word) for word in line] for line in lines])]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def shared_run(finished, tmp_path_factory):
    """The tiny run's scores on a hub, and a second run that takes them from there.

    again  the words of the second run; done: what came of each command
    """
    home = tmp_path_factory.mktemp("hub")
    again = ["run", *finished.tiny.bare, "--reference", "FromFile", "--reference.path", "hub:me/scores"]
    write_scores(finished.path, home / "scores")
    swap = {str(finished.tiny.train): finished.tiny.eval, str(finished.tiny.eval): finished.tiny.train}
    with Hub() as hub:
        lines = {
            "run": [*again, "--out", home / "again"],
            "mismatch": [*[swap.get(word, word) for word in again], "--out", home / "other"],
            "missing": [*again[:-1], "hub:me/none", "--out", home / "none"],
            "not scores": [*again[:-1], "hub:me/empty@v1", "--out", home / "e"],
        }
        hub.repositories[("datasets", "me/scores")] = {
            file.name: file.read_bytes() for file in (home / "scores").iterdir()
        }
        hub.repositories[("datasets", "me/empty")] = {"README.md": b"nothing"}
        found = commands(*lines.values(), url=hub.url, home=home / "hf")
        done = dict(zip(lines, found, strict=True))
        yield SimpleNamespace(hub=hub, home=home, run=home / "again", again=again, done=done)


@pytest.mark.slow
def test_no_text_of_the_rows_is_shared(shared_run, finished):
    files = shared_run.hub.repositories[("datasets", "me/scores")]
    assert set(files) == {"README.md", "confidence.parquet", "dynamics.parquet", "rows.parquet"}
    texts = [json.loads(line)["output"] for line in finished.tiny.train.read_text().splitlines()]
    long = [text.encode() for text in texts if len(text) > 12]
    assert long
    assert [name for name, data in files.items() for text in long if text in data] == []


@pytest.mark.slow
def test_scores_from_the_hub_make_the_same_split_and_the_same_weights(shared_run, finished):
    code, _, err = shared_run.done["run"]
    assert code == 0, err
    assert groups(shared_run.run) == groups(finished.path)
    for file in ("confidence/confidence.parquet", "train/model/model.safetensors"):
        assert (shared_run.run / file).read_bytes() == (finished.path / file).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "code", "words"),
    [
        ("mismatch", 3, ["has scores of 29 rows", "11 of the 11 rows of this run are not among them"]),
        ("missing", 3, ["hub:me/none cannot be fetched"]),
        ("not scores", 3, ["hub:me/empty@v1 has no dynamics.parquet, rows.parquet", "write_scores"]),
    ],
)
def test_wrong_scores_are_refused(shared_run, case, code, words):
    found, _, err = shared_run.done[case]
    assert found == code, err
    assert [word for word in words if word not in err] == [], err
    if case == "not scores":  # the revision of a name is asked for
        assert "GET /api/datasets/me/empty/revision/v1" in shared_run.hub.asked


@pytest.mark.slow
def test_scores_are_read_without_a_network_once_they_were_fetched(shared_run, finished):
    line = [*shared_run.again, "--out", shared_run.home / "offline"]
    ((code, _, err),) = commands(line, url="http://127.0.0.1:9", home=shared_run.home / "hf", offline="1")
    assert code == 0, err
    assert groups(shared_run.home / "offline") == groups(finished.path)


def test_an_export_has_a_card_and_leaves_the_run_as_it_was(finished, sftmix, tmp_path):
    shutil.copytree(finished.path, tmp_path / "run")
    before = (tmp_path / "run" / "train" / "MANIFEST.json").read_bytes()
    words = ("export", str(tmp_path / "run"), "--to")
    assert sftmix(*words, str(tmp_path / "model")).code == 0
    assert sftmix(*words, str(tmp_path / "mit"), "--license", "mit").code == 0
    assert ModelCard((tmp_path / "mit" / "README.md").read_text()).data.license == "mit"
    card = ModelCard((tmp_path / "model" / "README.md").read_text())
    assert card.data.license is None
    assert "TO BE FILLED IN" in card.text
    own = tmp_path / "run" / "train" / "model" / "README.md"
    assert "SFTMix target" in own.read_text()
    assert "NTP baseline" in (tmp_path / "run" / "baseline" / "model" / "README.md").read_text()
    own.write_text("mine")
    assert sftmix(*finished.words, "--out", str(tmp_path / "run")).code == 0
    assert own.read_text() == "mine"
    assert (tmp_path / "run" / "train" / "MANIFEST.json").read_bytes() == before
