"""Under torchrun an error is told once. Ranks that end with their launcher: tests/faults/test_torchrun.py."""

import pytest

from tests.tiny import in_this_process, sftmix

pytestmark = pytest.mark.long


@pytest.mark.slow
def test_a_mistake_in_an_option_is_told_first_and_last_and_by_one_rank(tmp_path):
    done = sftmix("run", "--training.epochz", "3", ranks=3, cwd=tmp_path)
    assert done.returncode == 1  # torchrun's own for any failure
    lines = done.stderr.splitlines()
    assert lines[0].startswith("error: unknown option training.epochz")
    assert lines[-2].strip().startswith("traceback : error: unknown option training.epochz")
    assert sum("epochz" in line for line in lines) == 2, done.stderr
    codes = [line.split()[2] for line in lines if line.strip().startswith("exitcode")]
    assert codes == ["2"] * len(codes) != []


@pytest.mark.slow
def test_rows_that_are_not_there_are_told_by_one_rank_and_nothing_is_made(small, tmp_path):
    words = [word if word != str(small.train) else "no.json" for word in small.options]
    done = sftmix("run", *words, "--out", "run", ranks=2, cwd=tmp_path)
    assert done.returncode == 1
    assert not (tmp_path / "run").exists()
    lines = done.stderr.splitlines()
    begins = [line.split("no.json")[0].strip() for line in lines if "no.json" in line]
    assert begins == [f"run: {small.model} on", "error: data.train:", "traceback : error: data.train:"]
    assert lines[-2].strip().startswith("traceback : error: data.train")


EACH_RANK_REFUSES = """
import os, time
from sftmix.words.errors import ConfigError
from sftmix.components import RandomSplit

class Refuses(RandomSplit):
    def __init__(self):
        if os.environ.get("RANK") == "1":
            raise ConfigError("rank one says no")
        time.sleep(2)  # rank one waits for this
        raise ConfigError("rank zero says never")
"""


@pytest.mark.slow
def test_a_rank_tells_its_own_error_where_the_first_has_another(small, tmp_path):
    (tmp_path / "refusing.py").write_text(EACH_RANK_REFUSES)
    words = ["run", *small.options, "--splitter", "refusing.Refuses", "--out", "run"]
    done = sftmix(*words, ranks=2, cwd=tmp_path)
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    for rank, said in enumerate(("rank zero says never", "rank one says no")):
        told = [line for line in lines if said in line and "traceback : " not in line]
        assert len(told) == 1
        assert told[0].startswith(f"[rank {rank}] error: " if rank else "error: ")


@pytest.mark.slow
def test_fsdp_alone_is_told_the_command_that_works(small, tmp_path):
    done = in_this_process("run", *small.options, "--training.parallel", "fsdp", "--out", "run", cwd=tmp_path)
    assert done.returncode == 2
    assert "torchrun --nproc_per_node N -m sftmix " in done.stderr
