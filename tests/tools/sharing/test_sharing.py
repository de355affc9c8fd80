"""Models and scores go to a hub and come back, by the real client and a local stand-in of the hub's API."""

import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
from huggingface_hub import ModelCard

from tests.tiny import ROOT, groups, table
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
    """The tiny run's model and scores uploaded, and a second run that takes the scores from the hub.

    again  the words of the second run; done: what came of each command
    """
    home = tmp_path_factory.mktemp("hub")
    again = ["run", *finished.tiny.bare, "--reference", "FromFile", "--reference.path", "hub:me/scores"]
    config = ["--config", finished.path / "config.yaml"]
    swap = {str(finished.tiny.train): finished.tiny.eval, str(finished.tiny.eval): finished.tiny.train}
    with Hub() as hub:
        lines = {
            "model": ["export", finished.path, "--push_to_hub", "me/model", "--license", "mit", "--private"],
            "scores": ["confidence", *config, "--push_to_hub", "me/scores"],
            "run": [*again, "--out", home / "again"],
            "mismatch": [*[swap.get(word, word) for word in again], "--out", home / "other"],
            "missing": [*again[:-1], "hub:me/none", "--out", home / "none"],
            "not scores": [*again[:-1], "hub:me/empty@v1", "--out", home / "e"],
        }
        hub.repositories[("datasets", "me/empty")] = {"README.md": b"nothing"}
        found = commands(*lines.values(), url=hub.url, home=home / "hf")
        done = dict(zip(lines, found, strict=True))
        yield SimpleNamespace(hub=hub, home=home, run=home / "again", again=again, done=done)


@pytest.mark.slow
def test_the_model_on_the_hub_is_that_of_the_run(shared_run, finished):
    code, out, err = shared_run.done["model"]
    assert (code, shared_run.hub.url in out) == (0, True), err
    model, files = finished.path / "train" / "model", shared_run.hub.files("model", "me/model")
    assert set(files) == {file.name for file in model.iterdir()}
    assert [name for name, data in files.items() if name != "README.md" and data != (model / name).read_bytes()] == []
    assert shared_run.hub.private[("models", "me/model")]
    card = ModelCard(files["README.md"].decode())
    assert (card.data.license, card.data.library_name) == ("mit", "transformers")


@pytest.mark.slow
def test_no_text_of_the_rows_is_shared(shared_run, finished):
    code, _, err = shared_run.done["scores"]
    assert code == 0, err
    files = shared_run.hub.files("dataset", "me/scores")
    assert set(files) == {"README.md", "confidence.parquet", "dynamics.parquet", "rows.parquet"}
    assert not shared_run.hub.private[("datasets", "me/scores")]
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
        ("not scores", 3, ["hub:me/empty@v1 has no dynamics.parquet, rows.parquet", "confidence --push_to_hub"]),
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


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "--to is missing"),
        (["--push_to_hub", "me/model"], "needs --license"),
        (["--to", "there", "--private"], "--private (True) is for an upload"),
        (["--push_to_hub", "a/b/c", "--license", "mit"], "--push_to_hub a/b/c"),
    ],
)
def test_wrong_uploads_are_refused(finished, sftmix, words, told):
    done = sftmix("export", str(finished.path), *words)
    assert (done.code, told in done.err) == (2, True), done.err


def test_scores_of_a_confidence_without_dynamics_are_not_shared(finished, sftmix, tmp_path):
    file = tmp_path / "scores.csv"
    ids = table(finished.path / "confidence" / "confidence.parquet")["id"]
    file.write_text("id,score\n" + "".join(f"{name},{number}\n" for number, name in enumerate(ids)))
    words = ["confidence", *finished.tiny.bare, "--confidence", "FromFile", "--confidence.path", str(file)]
    done = sftmix(*words, "--push_to_hub", "me/scores", "--out", str(tmp_path / "run"))
    assert (done.code, "--confidence FromFile does without" in done.err) == (2, True), done.err
    assert not (tmp_path / "run").exists()


def test_confidence_prints_its_configuration_without_the_options_of_an_upload(finished, sftmix):
    words = ["confidence", "--config", str(finished.path / "config.yaml"), "--print_config"]
    done = sftmix(*words)
    assert done.code == 0, done.err
    assert sftmix(*words, "--push_to_hub", "me/scores").out == done.out
    assert "push_to_hub" not in done.out
    assert "--push_to_hub" in sftmix("confidence", "--help").out


def test_an_export_has_a_card_and_leaves_the_run_as_it_was(finished, sftmix, tmp_path):
    shutil.copytree(finished.path, tmp_path / "run")
    before = (tmp_path / "run" / "train" / "MANIFEST.json").read_bytes()
    assert sftmix("export", str(tmp_path / "run"), "--to", str(tmp_path / "model")).code == 0
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
