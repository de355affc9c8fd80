"""Refused commands as processes of their own: what they leave untouched, and what they never import."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from sftmix.pipeline.directory import RunDirectory
from sftmix.ranks.world import World
from tests.tiny import ROOT, SHORT, contents, status

Call = Callable[..., SimpleNamespace]

NO_TORCH = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers"):
            raise AssertionError(f"{name} was imported")

sys.meta_path.insert(0, Refuse())
from sftmix.cli import main
"""
ONE_COMMAND = NO_TORCH + "sys.exit(main())"
COMMANDS = (
    NO_TORCH
    + """
import contextlib, io, json

for line in sys.stdin:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(json.loads(line))
    print(json.dumps([code, out.getvalue(), err.getvalue()]), file=sys.__stdout__, flush=True)
"""
)
"""A process that cannot import torch: a command in each line of its input, the result in each of its output."""


@pytest.fixture(scope="module")
def without_torch() -> Iterator[Call]:
    """Run a command where torch cannot be imported."""
    words = [sys.executable, "-c", COMMANDS]
    with subprocess.Popen(words, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        asked, answers = process.stdin, process.stdout
        assert asked is not None
        assert answers is not None

        def call(*words: str) -> SimpleNamespace:
            print(json.dumps(words), file=asked, flush=True)
            code, out, err = json.loads(answers.readline())
            assert "was imported" not in err
            return SimpleNamespace(code=code, out=out, err=err)

        yield call
        asked.close()


def missing(path: Path) -> str:
    return str(path.with_name("is-not-there" + path.suffix))


def with_rows(words: list[str], option: str, rows: str) -> list[str]:
    """The words with other rows: an option that takes several values is not given twice."""
    place = words.index(option) + 1
    return [*words[:place], rows, *words[place + 1 :]]


# ---------------------------------------------------------------------- a finished run stays as it was

REFUSED = {
    "template, which is known with the rows": (("--data.template", "alpaca"), "data.template: 'tokenizer' -> 'alpaca'"),
    "selection, which is a new stage": (
        ("--selector", "Longest", "--selector.k", "9"),
        "other inputs: the training rows are others, as the model sees them (data.train, selector, ",
    ),
    "reference": (("--reference.model.path", "./is-not-there"), "reference.model.path: ./is-not-there is not"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_refused_command_leaves_a_finished_run_as_it_was(finished, copied, sftmix, kind):
    words, message = REFUSED[kind]
    before = contents(copied)
    done = sftmix(*finished.words, *words, "--out", str(copied))
    assert (done.code, message in done.err) == (2, True), done.err
    assert contents(copied) == before


FOREIGN = ("config.yaml", "summary.json", "STATUS.json", "started.json", "split/split.parquet", "train/MANIFEST.json")


@pytest.mark.parametrize("name", [*FOREIGN, "train/metrics.jsonl", "train/inputs.json", "base"])
def test_a_file_that_no_run_wrote_is_not_replaced(name, tiny, tmp_path, without_torch):
    """As with `--config config.yaml --out .`; refused at the start, before a reference is trained."""
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text('{"seed": 3}\n')
    before = contents(tmp_path)
    done = without_torch("run", *tiny.bare, "--splitter", "RandomSplit", "--out", str(tmp_path))
    place = tmp_path / (name if name in FOREIGN[:4] else name.partition("/")[0])
    assert (done.code, f"out: no run wrote {place}," in done.err) == (2, True), done.err
    assert contents(tmp_path) == before


def test_a_table_does_not_replace_a_file_either(tiny, tmp_path, without_torch):
    """As with `compare --config compare.yaml --out .`."""
    for name in ("STATUS.json", "compare.yaml"):
        out = tmp_path / name.partition(".")[0]
        out.mkdir()
        (out / name).write_text('{"variants": {"NTP": {"objective": "NTP"}}}\n')
        before = contents(out)
        variants = ("--variants", "{NTP: {objective: NTP}}", "--seeds", "[1]")
        done = without_torch("compare", *tiny.options, *variants, "--out", str(out))
        assert (done.code, f"holds {name}, which no table wrote" in done.err) == (2, True), done.err
        assert contents(out) == before


def test_a_run_that_was_refused_before_its_first_stage_can_be_started(finished, tmp_path, sftmix):
    """Its STATUS.json is there alone; and a process that was killed early may have left an empty stage."""
    out = tmp_path / "run"
    out.mkdir()
    words = ("reference", *finished.tiny.options, *SHORT, "--out", str(out))
    assert sftmix(*words, "--data.template", "no-such-template").code != 0
    assert [file.name for file in out.glob("[!.]*")] == ["STATUS.json"]
    (out / "reference").mkdir()
    assert sftmix(*words).code == 0
    (out / "started.json").unlink()
    (out / "config.yaml").unlink()
    (out / "summary.json").unlink()
    assert sftmix(*words).code == 0, "a stage that was copied from another run is read back"


@pytest.mark.parametrize("key", ["model.path", "data.train"])
def test_a_run_is_not_made_in_the_directory_of_its_inputs(key, tiny, tmp_path, sftmix):
    rows = tmp_path / "rows"
    rows.mkdir()
    shutil.copy(tiny.train, rows)
    place = {"model.path": tiny.model, "data.train": rows}[key]
    before = contents(place)
    words = [*with_rows(list(tiny.bare), "--data.train", str(rows)), "--data.train+", str(tiny.train)]
    done = sftmix("run", *words, "--splitter", "RandomSplit", "--out", f"{place}/../{place.name}")
    assert (done.code, f"is {key} as well" in done.err) == (2, True), done.err
    assert contents(place) == before


def test_rows_that_cannot_be_read_leave_a_finished_run_as_it_was(finished, copied, tiny, sftmix):
    tiny.train.write_text('{"instruction": "no response"}\n' * 9)
    before = contents(copied)
    for rows, message in (
        (str(tiny.train), "train.jsonl:1: field 'output' is missing"),
        (missing(tiny.train), "no such file"),
    ):
        done = sftmix(*with_rows(finished.words, "--data.train", rows), "--out", str(copied))
        assert (done.code, message in done.err) == (3, True), done.err
        assert contents(copied) == before


def test_a_directory_in_use_keeps_its_status(finished, copied, without_torch):
    before = contents(copied)
    with RunDirectory(copied, World()) as directory:
        done = without_torch(*finished.words, "--out", str(copied))
        assert (done.code, contents(copied)) == (5, before)
        directory.starts_work()
        directory.status(stage="train")
        during = contents(copied)
        assert during != before
        assert without_torch(*finished.words, "--seed", "7", "--out", str(copied)).code == 5
        assert contents(copied) == during


def test_a_refused_command_leaves_the_status_of_an_interrupted_run(finished, copied, without_torch):
    (copied / "train" / "MANIFEST.json").unlink()
    interrupted = {**status(copied), "stage": "train", "step": 2, "total_steps": 4, "exit_code": 143}
    (copied / "STATUS.json").write_text(json.dumps(interrupted))
    before = contents(copied)
    assert without_torch(*finished.words, "--seed", "7", "--out", str(copied)).code == 2
    assert contents(copied) == before
    told = without_torch("status", str(copied)).out
    assert told.startswith(f"{copied}: exit code 143 in train; the same command continues it")


def test_stages_are_compared_before_the_first_is_made(tiny, tmp_path, sftmix):
    """A run without pairs has no reference: none is trained for a target that is refused."""
    run = tmp_path / "run"
    words = ["run", *tiny.options, *SHORT, "--out", str(run)]
    assert sftmix(*words, "--objective", "NTP").code == 0
    before = contents(run)
    done = sftmix(*words)
    assert (done.code, f"{run / 'train'}: was made with other inputs" in done.err) == (2, True), done.err
    assert contents(run) == before


def test_a_run_that_is_read_back_is_finished(finished, copied, sftmix):
    """On shards, too, and without torchrun: nothing is left to be trained."""
    first = status(copied)
    done = sftmix(*finished.words, "--training.parallel", "fsdp", "--out", str(copied))
    assert (done.code, "held-out NLL per response token" in done.out) == (0, True), done.err
    assert (status(copied), first["exit_code"]) == (first, 0)


# ------------------------------------------------------------------------------- how a run ended


def test_status_tells_why_a_new_run_was_refused(tiny, tmp_path, without_torch):
    run = tmp_path / "run"
    words = with_rows(["run", *tiny.options, "--out", str(run)], "--data.train", missing(tiny.train))
    assert without_torch(*words).code == 3
    assert not run.exists(), "a name that is wrong leaves no directory"
    run.mkdir()
    assert without_torch(*words).code == 3
    assert (status(run)["exit_code"], status(run)["message"][:10]) == (3, "DataError:")
    told = without_torch("status", str(run)).out
    assert "exit code 3 in start: data.train: " in told


@pytest.mark.slow
def test_ctrl_c_is_told_and_the_same_command_continues(tiny, tmp_path, without_torch):
    run = tmp_path / "run"
    words = ["run", *tiny.options, "--objective", "NTP", "--training.epochs", "400", "--out", str(run)]
    # A shell's background job ignores SIGINT, and so would what it starts.
    listening = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\nfrom sftmix.cli import main"
    )
    command = [sys.executable, "-c", f"{listening}; sys.exit(main())", *words]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    log, end = run / "train" / "metrics.jsonl", time.time() + 120
    while not (log.exists() and log.stat().st_size) and process.poll() is None and time.time() < end:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, "Traceback" in errors) == (130, False), errors
    assert status(run)["exit_code"] == 130
    told = without_torch("status", str(run)).out
    assert f"{run}: exit code 130 in train; the same command continues it" in told


# -------------------------------------------------------------------- refusals that load no torch


@pytest.mark.parametrize("command", ["run", "train", "reference", "preview", "estimate"])
def test_rows_and_models_that_are_not_there_are_refused_at_once(tiny, tmp_path, command, without_torch):
    out = [] if command in ("preview", "estimate") else ["--out", str(tmp_path / "run")]
    words = [command, *tiny.options, *out]
    for option, path in (("--data.train", tiny.train), ("--data.eval", tiny.eval)):
        rows = without_torch(*with_rows(words, option, missing(path)))
        assert (rows.code, f"{option[2:]}: {missing(path)}: no such file" in rows.err) == (3, True), rows.err
    model = without_torch(*words, "--model.path", missing(tiny.model))
    assert (model.code, "model.path: " in model.err) == (2, True)
    template = without_torch(*words, "--data.template", "chatlm")
    assert (template.code, "data.template: 'chatlm' is neither one of alpaca, chatml" in template.err) == (2, True)


def test_an_unwritable_out_is_refused_at_once(tiny, tmp_path, without_torch):
    (tmp_path / "file").touch()
    done = without_torch("run", *tiny.options, "--out", str(tmp_path / "file" / "run"))
    assert (done.code, f"{tmp_path / 'file' / 'run'} cannot be written" in done.err) == (2, True)


def test_a_confidence_of_its_own_command_needs_its_dynamics_too(tiny, tmp_path, without_torch):
    """Also where nothing is mixed: the reference would be trained first."""
    words = ["confidence", *tiny.options, "--objective", "NTP", "--confidence", "IFD", "--out", str(tmp_path / "run")]
    done = without_torch(*words)
    assert (done.code, "needs the NLL of each response without its instruction" in done.err) == (2, True), done.err


@pytest.mark.parametrize(
    ("option", "parallel"), [("training.parallel", "fsdp"), ("reference.training.parallel", "hsdp")]
)
def test_shards_without_torchrun_are_refused_at_once(tiny, tmp_path, option, parallel, without_torch):
    words = ["run", *tiny.options, f"--{option}", parallel, "--out", str(tmp_path / "run")]
    done = without_torch(*words)
    assert (done.code, f"{parallel} needs torchrun" in done.err) == (2, True)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("--seed", "7"), "reference: was made with other inputs: seed: 42 -> 7."),
        (
            ("--objective.mu", "0.7"),
            "objective.mu: 0.2 -> 0.7. Use another --out, or the old settings",
        ),
    ],
)
def test_a_directory_of_other_options_is_refused_at_once(finished, copied, words, named, without_torch):
    before = contents(copied)
    done = without_torch(*finished.words, *words, "--out", str(copied))
    assert (done.code, named in done.err) == (2, True), done.err
    assert contents(copied) == before


@pytest.mark.slow
def test_a_table_is_refused_at_once_as_a_whole(tiny, tmp_path, sftmix, without_torch):
    """Also for its last variant: no run before it is read back or started."""
    out, table = tmp_path / "table", tmp_path / "table.yaml"
    words = ["compare", "--config", str(table), *tiny.options, *SHORT, "--objective", "NTP", "--seeds", "[1]"]
    words += ["--out", str(out)]
    table.write_text(json.dumps({"variants": {"a": {}, "b": {}}}))
    assert sftmix(*words).code == 0
    before = contents(out)
    table.write_text(json.dumps({"variants": {"a": {}, "b": {"training.weight_decay": 0.5}}}))
    done = without_torch(*words)
    assert (done.code, "variant b, seed 1: " in done.err) == (2, True), done.err
    assert "training.weight_decay: 0.1 -> 0.5" in done.err
    assert contents(out) == before


def test_an_export_that_cannot_be_is_refused_at_once(finished, copied, tmp_path, without_torch):
    to = ("--to", str(tmp_path / "model"))
    shutil.rmtree(copied / "train" / "checkpoints", ignore_errors=True)
    for words, message in (
        ((str(tmp_path / "nothing"), *to), "is not a run directory"),
        ((str(copied), "--to", str(copied)), f"{copied} exists; name a directory that does not"),
        ((str(copied), *to), f"has no checkpoint; {copied / 'train' / 'model'} holds the model after the last step"),
        ((str(copied), *to, "--best"), f"{copied / 'train' / 'best'} has no checkpoint; a run writes some"),
        ((str(copied), *to, "--merge"), "trained all weights"),
    ):
        done = without_torch("export", *words)
        assert (done.code, message in done.err) == (2, True), done.err
    (copied / "train" / "checkpoints" / "step-00000004").mkdir(parents=True)
    done = without_torch("export", str(copied), *to, "--step", "3")
    assert (done.code, "has no checkpoint 3; it has 4" in done.err) == (2, True)


def test_a_run_says_what_it_does_before_torch_is_there(tiny, tmp_path):
    """An import of torch fails here, as the rest is in order."""
    command = [sys.executable, "-c", ONE_COMMAND, "run", *tiny.options, "--out", str(tmp_path / "run")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert "was imported" in done.stderr
    assert done.stderr.startswith(f"run: {tiny.model} on {tiny.train}, in {tmp_path / 'run'}\n")


# --------------------------------------------------------------------------------- closed outputs


@pytest.mark.parametrize(
    "words",
    [
        *("components", "--help", "status RUN"),
        *(
            pytest.param(f"run --{word}", marks=[pytest.mark.slow, pytest.mark.long])
            for word in ("help", "print_config")
        ),
    ],
)
@pytest.mark.parametrize("both", [False, True], ids=["stdout", "stderr, too"])
def test_nobody_reads_the_output(words, both, finished):
    reader, writer = os.pipe()
    os.close(reader)
    errors = writer if both else subprocess.PIPE
    command = [sys.executable, str(ROOT / "cli.py"), *words.replace("RUN", str(finished.path)).split()]
    done = subprocess.run(command, stdout=writer, stderr=errors, text=True, timeout=120)
    os.close(writer)
    assert (done.returncode, done.stderr or "") == (141, "")


@pytest.mark.slow
@pytest.mark.parametrize(("outputs", "code"), [("2>&1 | true", 141), (">/dev/full", 7), (">&- 2>&-", 0)])
def test_a_run_goes_on_when_nobody_takes_what_it_says(tiny, tmp_path, outputs, code):
    words = [sys.executable, ROOT / "cli.py", "run", *tiny.options, *SHORT, "--out", tmp_path / "run"]
    line = f"{shlex.join(map(str, words))} {outputs}; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=300)
    assert (done.returncode, "Traceback" in done.stderr) == (code, False), done.stderr
    assert ("no space left for what this command prints" in done.stderr) == (code == 7)
    assert status(tmp_path / "run")["exit_code"] == 0
    assert (tmp_path / "run" / "train" / "model" / "README.md").exists()


def test_a_name_that_is_not_utf_8_is_refused_before_torch_is_there(tiny, tmp_path):
    """The tokenizer's files could not be written, after all training."""
    words = ["run", *tiny.options, "--out", os.fsencode(tmp_path) + b"/caf\xe9"]
    done = subprocess.run([sys.executable, "-c", ONE_COMMAND, *words], cwd=ROOT, capture_output=True, timeout=120)
    assert (done.returncode, b"which is not UTF-8" in done.stderr, b"PYTHONUTF8=1" in done.stderr) == (2, True, True)
    assert b"caf\xe9" not in os.listdir(os.fsencode(tmp_path))


@pytest.mark.parametrize(("option", "lora"), [("model.path", ("--model.lora.r", "4")), ("reference.model.path", ())])
def test_quantised_weights_are_refused_before_anything_is_trained(tiny, sftmix, tmp_path, option, lora):
    quantised = shutil.copytree(tiny.model, tmp_path / "quantised")
    config = json.loads((quantised / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (quantised / "config.json").write_text(json.dumps(config))
    done = sftmix("run", *tiny.options, *SHORT, *lora, f"--{option}", str(quantised), "--out", str(tmp_path / "run"))
    assert done.code == 2
    assert f"error: {option}: the weights of {quantised} are quantised (fp8), and such weights cannot" in done.err
    assert not (tmp_path / "run" / "train").exists()
