"""What a finished command says: the figures of summary.json, and only files that are there."""

from __future__ import annotations

from pathlib import Path

from sftmix.cli.results import held_out, measured, results

SPREAD = {"rows": 99, "before": 20.0, "after": 18.5, "log_before": 0.75, "log_after": 0.5}
SUMMARY = {
    "eval_nll_before": 5.125,
    "eval_nll_after": 3.25,
    "eval_nll_best": 3.0,
    "eval_nll_best_step": 40,
    "eval_accuracy": 0.25,
    "eval_exact_match": 0.0,
    "calibration": {"ece": 0.03125, "brier": 0.75, "nll_temperature_scaled": 3.125, "temperature": 1.5},
    "confidence_std": {**SPREAD, "vs_baseline": -0.07, "log_vs_baseline": 0.01},
    "baseline": {"eval_nll_after": 3.375, "calibration": None, "confidence_std": SPREAD},
    "confidence": {
        "confident": {"examples": 1500, "confidence_mean": -8.0, "confidence_std": 2.5},
        "unconfident": {"examples": 1500, "confidence_mean": -40.0, "confidence_std": 11.0},
        "unpaired": {"examples": 1},
    },
    "spearman_confidence_length": 0.31,
    "confounds": {
        "auc_length_confident": 0.625,
        "duplicates": {"examples_in_both": 2, "prompts_in_both": 7, "examples_with_prompt_in_both": 15},
        "labels": {"High": {"examples": 1200, "confidence_mean": -9.0, "confidence_std": 3.0}},
        "label_overlap": {"labels": ["High", "Low"], "bins": 20, "overlap": 0.75, "overlap_if_unrelated": 0.96},
        "mixed_token_share": 0.43,
    },
    "mixup_tokens": 1234,
    "ntp_tokens": 5678,
    "mu_effective": 0.92,
    "stages": {"train": {"wall_seconds": 20.0}, "reference": {"wall_seconds": 12.4}, "split": {}},
}


def test_the_figures_are_told(tmp_path: Path) -> None:
    (tmp_path / "train" / "model").mkdir(parents=True)
    assert results(tmp_path, SUMMARY, "train") == [
        "",
        "                                            before     after  NTP baseline",
        "held-out NLL per response token             5.1250    3.2500        3.3750",
        "  of the best evaluation                              3.0000",
        "    which was at step                                     40",
        "  after temperature scaling                           3.1250",
        "    mean temperature                                   1.500",
        "held-out token calibration error (ECE)                0.0312",
        "held-out Brier score                                  0.7500",
        "held-out token accuracy                                25.0%",
        "held-out exact match                                    0.0%",
        "sd of confidence, minus perplexity              20      18.5          18.5",
        "sd of confidence, minus mean NLL            0.7500    0.5000        0.5000",
        "sd of confidence against the NTP baseline: -7.0%, of minus mean NLL: +1.0%",
        "",
        "confident: 1,500 examples, confidence -8.00 +- 2.50",
        "unconfident: 1,500 examples, confidence -40.00 +- 11.00",
        "unpaired: 1 example",
        "label High: 1,200 examples, confidence -9.00 +- 3.00",
        "overlap of the confidence of High and Low: 0.75 (labels at random: 0.96)",
        "rank correlation of confidence with response length: 0.31",
        "AUC of response length telling the first group from the last: 0.62 (0.5: it cannot)",
        "in both groups: 2 examples, 7 prompts",
        "1,234 token pairs mixed beside 5,678 response tokens (43% of them mixed), mu_effective 0.92",
        "time: reference 12 s, train 20 s",
        f"see {tmp_path / 'train' / 'model'}",
    ]


def test_status_tells_the_held_out_loss_on_one_line() -> None:
    assert held_out(SUMMARY) == ["held-out NLL per response token: before 5.1250, after 3.2500, NTP baseline 3.3750"]


def test_what_a_run_did_not_do_is_not_mentioned(tmp_path: Path) -> None:
    assert results(tmp_path, {"stages": {}}, "reference") == [""]
    assert results(tmp_path, {"eval_nll_after": None, "mixup_tokens": 0, "ntp_tokens": 9}, "train") == [""]
    title, line, blank = measured({"eval_nll_after": 2.0, "calibration": None, "confounds": {}})
    assert (title.split(), line.split()[-1], blank) == (["before", "after"], "2.0000", "")
