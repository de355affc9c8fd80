"""The first hour on a GPU, rehearsed on a CPU: its options, and what it tells."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from benchmarks.first_gpu_hour import PARTS, PUBLIC, TINY, command, issue, told
from benchmarks.report import RESULTS

ROOT = Path(__file__).resolve().parents[2]


def hour(out: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """`python -m benchmarks.first_gpu_hour`."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    words = ("-m", "benchmarks.first_gpu_hour", "--out", str(out), *words)
    command = [sys.executable, *words]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)


@pytest.mark.long
@pytest.mark.slow
def test_without_a_gpu_it_says_what_to_do(tmp_path):
    done = hour(tmp_path)
    assert done.returncode == 2
    assert "no GPU" in done.stderr
    assert "--tiny" in done.stderr
    assert not list(tmp_path.iterdir())


def test_the_results_of_another_machine_are_not_taken_for_ones_own():
    assert not (RESULTS / "first-gpu-hour").exists()


@pytest.mark.long
@pytest.mark.slow
def test_a_rehearsal_on_a_cpu_runs_to_its_end_and_is_not_made_twice(tmp_path):
    words = ("--tiny", "--parts", "loss-4096x151936", "run", "step-small")
    first = hour(tmp_path, *words)
    assert first.returncode == 0, first.stdout + first.stderr
    kept = {path.name: path.read_bytes() for path in tmp_path.glob("*.json")}
    assert len(kept) == 3
    again = hour(tmp_path, *words)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "at most" not in again.stdout
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.json")} == kept
    rows = [line for line in (tmp_path / "issue.md").read_text().splitlines() if line.startswith("| ")]
    assert [line.split(" | ")[0][2:] for line in rows[1:]] == [*words[2:]]
    assert all("failed" not in line for line in rows)
    assert "weights are the same, bit for bit; exit code 0" in rows[2]
    places = (tempfile.gettempdir(), str(ROOT))
    assert not any(place in text.decode() for text in kept.values() for place in places)


def test_the_options_of_all_parts_are_those_of_the_scripts(tmp_path):
    """Each script is asked for its help; its options stand there."""
    scripts = {command(name, tmp_path, "cuda")[1] for name in PARTS if name not in ("tests", "run")}
    shown = {script: Path(script).read_text() + (ROOT / "benchmarks" / "report.py").read_text() for script in scripts}
    for name in PARTS:
        for device in ("cuda", "cpu"):
            words = command(name, tmp_path, device)
            if words[1] in shown:
                given = [word for word in words if word.startswith("--")]
                assert [word for word in given if f'"{word}"' not in shown[words[1]]] == []
    assert PUBLIC.keys() <= PARTS.keys()
    assert TINY.keys() <= {part.words.split()[0] for part in PARTS.values()}


def test_the_main_parts_come_first_and_take_fifteen_minutes():
    main = ["defaults-alpaca", "defaults-2048", "trl", "loss-4096x151936"]
    main += ["tests", "one-rank", "lora-bfloat16", "lora-float32"]
    assert list(PARTS)[: len(main)] == main
    assert sum(PARTS[name].minutes for name in main) <= 15
    assert all(PARTS[name].minutes <= 10 for name in PARTS)
    for name in ("defaults-alpaca", "defaults-2048"):
        assert "micro_batch" not in PARTS[name].words


@pytest.mark.long
@pytest.mark.slow
def test_steps_with_nothing_but_defaults_and_adapters_on_both_bases_say_what_was_chosen(tmp_path):
    words = ("--tiny", "--parts", "defaults-alpaca", "lora-bfloat16", "lora-float32")
    done = hour(tmp_path, *words)
    assert done.returncode == 0, done.stdout + done.stderr
    made = [json.loads(next(tmp_path.glob(f"*-{name}-cpu.json")).read_text()) for name in words[2:]]
    chosen = made[0]["chosen"]
    assert {layout: one["deterministic"] for layout, one in chosen.items()} == {
        "defaults": "auto",
        "defaults, deterministic": True,
    }
    assert {one["compile"] for one in chosen.values()} == {False}
    assert [*made[1]["last loss"].values()] == [*made[2]["last loss"].values()]


@pytest.mark.long
@pytest.mark.slow
def test_sharded_on_one_rank_killed_and_continued_verified_and_exported(tmp_path):
    """What a GPU is asked to show, on a CPU: the same bits."""
    done = hour(tmp_path, "--tiny", "--parts", "one-rank")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert (report["steps"], report["steps whose losses differ"]) == (6, [])
    assert 2 <= report["killed after step"] <= 6
    assert report["verify"].endswith("weights are the same, bit for bit")
    assert report["bytes of the export"] > 1e5


STEP = {
    "real_tokens_per_second": {"ntp, padded": 25_000.0, "sftmix, padded": 24_750.0, "scoring": 90_000.0},
    "gflops": {"ntp, padded": 400_100.0, "sftmix, padded": 396_000.0},
    "mfu": {"ntp, padded": 0.55, "sftmix, padded": 0.545},
    "peak_gib": {"ntp, padded": 40.04, "sftmix, padded": 41.0},
    "a step, profiled": {"ntp, padded": {"calls": {"cudaStreamSynchronize": 7}}, "sftmix, padded": {"calls": {}}},
    "chosen": {"padded": {"compile": True, "attention": "varlen"}},
    "clock and power": {"ntp, padded": {"mhz": 1485.0, "watts": 699.6}},
    "sftmix / ntp, step by step": {"padded": {"median": 1.01, "q1": 1.008, "q3": 1.013, "n": 20}},
}
LOSS = {
    "results": {"gemm": {"seconds": 0.04, "peak_mib": 3072.0}, "fused_sftmix": {"seconds": 0.05, "peak_mib": 4096.0}},
    "errors": {"naive_ntp": "OutOfMemoryError('20 GiB')"},
}


@pytest.mark.parametrize(
    ("name", "report", "said"),
    [
        ("tests", None, "not run"),
        ("tests", {"failed": 1, "end": ["F", "1 failed, 3 passed"]}, "failed (1): 1 failed, 3 passed"),
        ("run", {"failed": -9, "end": []}, "failed (-9): "),
        (
            "loss-4096x151936",
            LOSS,
            "gemm 40.0 ms (100% of it matmuls), 3.0 GiB; fused_sftmix 50.0 ms (80% of it matmuls), 4.0 GiB; "
            "naive_ntp: OutOfMemoryError('20 GiB')",
        ),
        (
            "step-1b",
            STEP,
            "scoring 90,000 tokens/s; padded: compile True, attention varlen; "
            "ntp, padded 25,000 tokens/s, 400 TFLOP/s (55.0% of the best matmul's), 40.0 GiB, "
            "7 waits of the host, 1485 MHz, 700 W; "
            "sftmix, padded 24,750 tokens/s, 396 TFLOP/s (54.5% of the best matmul's), 41.0 GiB, "
            "0 waits of the host; sftmix / ntp, padded 1.010 (1.008 to 1.013, n 20)",
        ),
        (
            "run",
            {
                "stages": {"reference": {"tokens": 600, "elapsed": 2.0, "scoring_seconds": 0.5}, "split": {}},
                "verify": ["steps 1 to 4 are the same", "exit code 0"],
            },
            "reference 300 tokens/s; scoring 1,200 tokens/s; steps 1 to 4 are the same; exit code 0",
        ),
        (
            "one-rank",
            {"killed after step": 9, "steps": 24, "steps whose losses differ": [10, 11], "verify": "steps 1 to 4 are"},
            "killed after step 9; other losses in 2 of 24; steps 1 to 4 are",
        ),
        (
            "trl",
            {
                "contestants": {"ours": {"real_tokens_per_second": {"median": 24_000.0}}},
                "skipped": {"trl_liger": "needs liger_kernel"},
                "ratios": {"ours / theirs": {"speed by seconds": {"median": 1.2, "q1": 1.1, "q3": 1.3, "n": 3}}},
            },
            "ours 24,000 tokens/s; trl_liger skipped: needs liger_kernel; ours / theirs 1.200 (1.100 to 1.300, n 3)",
        ),
        (
            "estimate",
            {"settings": {"LoRA": {"estimated / measured": 0.98}}},
            "estimated / measured peak LoRA 0.98",
        ),
    ],
)
def test_a_part_is_told_in_a_line(name, report, said):
    assert told(name, report) == said


def test_the_issue_has_machine_commit_and_public_figures_beside_ours():
    machine = {"device": "H100", "versions": {"torch": "2.13"}, "commit": "abc", "date": "2026-11-23"}
    lines = issue({"tests": {"said": "4 passed"}, "loss-4096x151936": LOSS, "trl": None}, machine).splitlines()
    assert lines[0].endswith("H100")
    assert "torch 2.13" in lines[2]
    assert "commit abc" in lines[2]
    assert lines[6] == "| tests | 4 passed |  |"
    assert "fused_sftmix 50.0 ms" in lines[7]
    assert "trl #7244" in lines[7]
    assert lines[8] == "| trl | not run |  |"
