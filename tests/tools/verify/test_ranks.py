"""A run of two ranks, verified by two and by one."""

import json

import pytest

from tests.tiny import sftmix as process
from tests.tools.verify.runs import certified

pytestmark = pytest.mark.long


@pytest.mark.slow
def test_a_run_of_two_ranks_is_verified_by_two_and_by_one(ntp, tmp_path, sftmix):
    words = ["--objective", "NTP", "--training.max_steps", "4", "--checkpoint.every", "2", "--out", f"{tmp_path}/run"]
    done = process("run", *ntp.tiny.options, *words, ranks=2)
    assert done.returncode == 0, done.stderr
    two = process("verify", str(tmp_path / "run"), "--json", ranks=2)
    assert two.returncode == 0, two.stderr
    found = json.loads(two.stdout)
    assert (found["same"], found["exact"], found["machine"]["different"]) == (True, True, [])
    assert found["sentence"] == ("steps 3 to 4 of train replayed: examples, losses, weights are the same, bit for bit")
    by_one = certified(sftmix, str(tmp_path / "run"))
    assert (by_one.code, by_one.same, by_one.machine["different"]) == (0, True, ["ranks is 2 in the run and 1 here"])
