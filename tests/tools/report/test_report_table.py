"""`sftmix report` on a table of `compare`: its differences and curves against table.json and the runs' own files."""

from __future__ import annotations

import json

import pytest

from tests.tiny import metrics, sftmix
from tests.tools.report.pages import Text

pytestmark = pytest.mark.long

pytest.importorskip("sklearn")
write_report = pytest.importorskip("sftmix.tools.report.write").write_report


@pytest.mark.slow
def test_a_table_shows_its_paired_differences(finished, tmp_path):
    variants = "{NTP: {objective: NTP}, SFTMix: {}, mu-1: {objective.mu: 1}}"
    words = ["--config", str(finished.path / "config.yaml"), "--with_baseline", "false", "--variants", variants]
    short = ["--seeds", "[1,2]", "--training.max_steps", "2", "--out", str(tmp_path / "table")]
    done = sftmix("compare", *words, *short, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    made = json.loads((tmp_path / "table" / "table.json").read_text())
    assert write_report([tmp_path / "table"], map_size=0) == [tmp_path / "table" / "report" / "report.html"]
    page = Text(tmp_path / "table" / "report" / "report.html")
    means, seeds = page.plots["forest"]["data"]
    assert means["y"] == ["SFTMix - NTP", "mu-1 - NTP"]
    assert means["x"] == [contrast["mean"] for contrast in made["contrasts"]]
    arms = (means["error_x"][side] for side in ("arrayminus", "array"))
    ends = [(x - low, x + high) for x, low, high in zip(means["x"], *arms, strict=True)]
    assert ends == [pytest.approx(contrast["interval"], abs=1e-12) for contrast in made["contrasts"]]
    assert seeds["x"] == [off for contrast in made["contrasts"] for off in contrast["differences"]]
    losses = [line["ntp"] for line in metrics(tmp_path / "table" / "NTP" / "seed-1")]
    assert losses in [trace["y"] for trace in page.plots["curves-ntp"]["data"]]
    assert {trace["name"] for trace in page.plots["curves-mixup"]["data"]} == {"SFTMix", "mu-1"}
    for contrast in made["contrasts"]:
        assert f"{contrast['mean']:+.4f}" in page.text
