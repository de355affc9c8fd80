"""F7 and F11: any damage to any file of a checkpoint or of a finished stage is seen; clocks decide nothing."""

import os
import random
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch import nn

from sftmix.disk.files import file_entry, hashed, read_json, verify_directory, write_json
from sftmix.ranks.world import World
from sftmix.training.checkpoint import CheckpointStore
from tests.fast import some_fast
from tests.faults.runs import one_bit
from tests.tiny import contents, in_this_process

OLDER, NEWEST = "step-00000009", "step-00000012"
FLIPS = 20


def damages(content: bytes, chance: random.Random) -> Iterator[tuple[str, bytes]]:
    """Every way to damage the bytes of a file."""
    yield from (("empty", b""), ("one byte", content[:1]), ("half", content[: len(content) // 2]))
    yield from (("one byte less", content[:-1]), ("one byte more", content + b"\0"), ("appended", content * 2))
    for _ in range(FLIPS):
        flipped, bit = bytearray(content), chance.randrange(8 * len(content))
        flipped[bit // 8] ^= 1 << bit % 8
        yield f"bit {bit}", bytes(flipped)
    start = chance.randrange(max(1, len(content) - 4096))
    zeroed = content[:start] + bytes(len(content[start : start + 4096])) + content[start + 4096 :]
    yield f"4 KiB of zeros at {start}", zeroed


@pytest.fixture
def kept(whole, tmp_path) -> Path:
    shutil.copy(whole / "train" / "metrics.jsonl", tmp_path)  # each checkpoint has the hash of the lines up to its step
    return Path(shutil.copytree(whole / "train" / "checkpoints", tmp_path / "checkpoints"))


def newest(directory: Path) -> tuple[int | None, list[str]]:
    """The step to resume from, and the warnings on the way."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        return CheckpointStore(directory, keep=2, world=World()).newest_valid(), [str(w.message) for w in told]


def assert_passed_over(directory: Path) -> None:
    step, told = newest(directory)
    assert step == 9
    assert len(told) == 1
    assert NEWEST in told[0]


@pytest.mark.slow
def test_every_damage_of_every_file(kept):
    chance = random.Random("damage")
    files = sorted((kept / NEWEST).iterdir())
    assert {f.suffix for f in files} == {".json", ".safetensors"}
    for file in files:
        content = file.read_bytes()
        for name, damaged in damages(content, chance):
            if damaged == content.removesuffix(b"\n"):  # a manifest without its last newline says the same
                continue
            file.write_bytes(damaged)
            assert verify_directory(kept / NEWEST, within=(kept / NEWEST).parents[1]) is not None, (
                f"{file.name}: {name}"
            )
        assert_passed_over(kept)
        file.unlink()
        assert_passed_over(kept)
        file.write_bytes(content)
    assert newest(kept) == (12, [])


SHARD = "shard-00001.safetensors"
OTHERS = {
    "its shard": (SHARD, SHARD),
    "one shard more": (SHARD, "shard-00009.safetensors"),  # the reader takes all that lie there
    "a hidden shard more": (SHARD, ".aa.safetensors"),  # torch's reader does not pass over hidden files
    "what macOS leaves": ("state.json", f"._{SHARD}"),
    "its manifest": ("MANIFEST.json", "MANIFEST.json"),
}
"""A file of the checkpoint of another run, and the name that it gets here."""


@pytest.mark.parametrize("what", OTHERS)
def test_files_of_another_run(kept, whole, what):
    name, to = OTHERS[what]
    shutil.copy(whole / "reference" / "checkpoints" / NEWEST / name, kept / NEWEST / to)
    assert_passed_over(kept)


def test_files_that_torch_does_not_read_do_no_harm(kept):
    for name in (".nfs0001", ".DS_Store", "notes.txt", ".ipynb_checkpoints/state-checkpoint.json"):
        (kept / NEWEST / name).parent.mkdir(exist_ok=True)
        (kept / NEWEST / name).write_text("{}")
    (kept / NEWEST / "gone").symlink_to("nowhere")
    assert newest(kept) == (12, [])


GENERATE = ["generate", "run", "--to", "answers.jsonl"]
EVALUATE = ["evaluate", "run", "--tasks", "x"]
REPORT = ["report", "run", "--map", "0"]
OPENED = [
    *(("train/model/model.safetensors", words) for words in (GENERATE, ["chat", "run"], EVALUATE)),
    ("train/model/config.json", ["report", "run"]),
    *((f"{name}.parquet", REPORT) for name in ("split/split", "confidence/confidence", "train/eval", "base/sample")),
    *((f"{stage}/metrics.jsonl", REPORT) for stage in ("reference", "train")),
    ("reference/scores/step-00000006.parquet", REPORT),
    ("train/metrics.jsonl", ["export", "run", "--to", "model"]),
]


@pytest.mark.parametrize(("name", "words"), OPENED, ids=[f"{words[0]} {name}" for name, words in OPENED])
def test_a_damaged_result_is_not_opened(finished, tmp_path, name, words):
    """One bit of an output of a finished stage."""
    shutil.copytree(finished.path, tmp_path / "run")
    one_bit(tmp_path / "run" / name)
    before = contents(tmp_path)
    refused = in_this_process(*words, cwd=tmp_path)
    assert refused.returncode == 4, refused.stderr
    stage, _, file = name.partition("/")
    assert refused.stderr.endswith(
        f"{stage}: {file} does not have the hash it was written with; restore it, or move run/{stage} away\n"
    )
    assert contents(tmp_path) == before


OTHER_KINDS = [
    ("split", "confounds", None),
    ("split", "confidence.unconfident.confidence_median", "x"),
    ("split", "confidence", [[1, 2]]),
    ("split", "tied", "x"),
    ("train", "wall_seconds", []),
    ("train", "mu_effective", "x"),
    ("base", "eval_nll", {"a": 1}),
]
"""Figures in a form that no run writes, under a manifest with the hash of them."""


@pytest.mark.parametrize("command", ["run", "report"])
@pytest.mark.parametrize(
    ("stage", "key", "value"), some_fast(OTHER_KINDS, every=3), ids=[f"{s}.{key}" for s, key, _ in OTHER_KINDS]
)
def test_figures_of_another_kind_are_no_traceback(finished, tmp_path, command, stage, key, value):
    run = Path(shutil.copytree(finished.path, tmp_path / "run"))
    file, manifest = run / stage / "figures.json", run / stage / "MANIFEST.json"
    figures = read_json(file)
    *path, last = key.split(".")
    place = figures
    for name in path:
        place = place[name]
    place[last] = value
    write_json(file, figures)
    files = read_json(manifest)["files"]
    if "figures.json" in files:
        write_json(manifest, hashed({"files": files | {"figures.json": file_entry(file)}}))
    words = [*finished.words, "--out", str(run)] if command == "run" else ["report", str(run), "--map", "0"]
    done = in_this_process(*words, cwd=tmp_path)
    assert done.returncode in (0, 4), done.stderr
    assert done.returncode == 0 or "is not as a run writes it" in done.stderr


@pytest.mark.long
@pytest.mark.slow
def test_damaged_suspects_are_not_shown(finished, tmp_path):
    shutil.copytree(finished.path, tmp_path / "run")
    assert in_this_process("suspects", "run", "--embedding", "tfidf", "--top", "1", cwd=tmp_path).returncode == 0
    assert in_this_process(*REPORT, cwd=tmp_path).returncode == 0
    one_bit(tmp_path / "run" / "suspects" / "suspects.parquet")
    refused = in_this_process(*REPORT, cwd=tmp_path)
    assert refused.returncode == 4
    assert (
        "suspects.parquet does not have the hash it was written with; restore it, or move run/suspects away"
        in refused.stderr
    )


def test_an_export_takes_no_older_checkpoint_by_itself(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    one_bit(tmp_path / "run" / "train" / "checkpoints" / NEWEST / "state.json")
    refused = in_this_process("export", "run", "--to", "model", cwd=tmp_path)
    assert refused.returncode == 4
    problem = f"{NEWEST}: state.json does not have the hash it was written with\n"
    assert refused.stderr.endswith(problem)
    assert in_this_process("export", "run", "--step", "9", "--to", "model", cwd=tmp_path).returncode == 0


def test_good_checkpoints_outlast_damaged_ones(kept):
    """The damaged one of step 12 is newer than the save that follows, and must not be kept in its place."""
    (kept / NEWEST / "state.json").write_text("{}")
    store = CheckpointStore(kept, keep=2, world=World())
    with pytest.warns(UserWarning, match="skipping"):
        assert store.newest_valid() == 9
    store.save(10, nn.Linear(2, 2), None, {})
    assert store.steps() == [10, 9]


def test_clocks_decide_nothing(kept):
    chance = random.Random("clocks")
    for _ in range(10):
        for path in kept.rglob("*"):
            at = chance.uniform(0, 2**32)
            os.utime(path, (at, at))
        assert newest(kept) == (12, [])
