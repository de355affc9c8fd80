"""The examples of docs/compare.md: arms of one order, which a table says, and arms of one temperature."""

import re
import runpy
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from sftmix.cli.parsing import read_arguments
from sftmix.components import LabelSmoothing
from sftmix.disk.files import read_json
from sftmix.tools.compare.command import CompareOptions, comparison_of

PAGE = Path(__file__).parents[3] / "docs" / "compare.md"


def test_the_variants_of_the_page_differ_in_their_objective_alone(plain, sftmix, tmp_path):
    (block,) = (text for text in re.findall(r"```yaml\n(.*?)```", PAGE.read_text(), re.S) if "variants:" in text)
    variants = yaml.safe_load(block)["variants"]
    (tmp_path / "variants.yaml").write_text(yaml.safe_dump({"variants": variants}, sort_keys=False))
    words = ("--config", str(tmp_path / "variants.yaml"), "--training.max_steps", "2", "--checkpoint.every", "0")
    command = ("compare", *plain.options, *words, "--seeds", "[1]", "--out", str(tmp_path / "table"))
    done = sftmix(*command)
    assert done.code == 0, done.err
    again = sftmix(*command, "--callbacks.every", "1")
    assert (again.code, again.err.count("is done, and its figures are of other callbacks")) == (0, 3)
    found = {one["ours"]: one["inputs_that_differ"] for one in read_json(tmp_path / "table/table.json")["contrasts"]}
    assert found == {"SFTMix": ["objective"], "mu-0.4": ["objective"]}


@pytest.mark.slow
@pytest.mark.long
def test_the_example_finds_the_strength_of_a_temperature(plain, tmp_path):
    """The wanted temperature is that of a known strength: of eighths of the range, three halvings are needed."""
    module = runpy.run_path(str(PAGE.parent / "examples" / "matched.py"))
    words = (*plain.options, "--training.max_steps", "6", "--training.learning_rate", "0.01", "--checkpoint.every", "0")
    table = comparison_of(read_arguments([*words, "--variants", "{a: {}}"], CompareOptions))

    def smoothed(epsilon):
        return replace(table.variants["a"], objective=LabelSmoothing(epsilon=epsilon))

    def matched(like, strongest, **options):
        return module["matched"](str(tmp_path / "pilot"), smoothed(like), smoothed, strongest, [1, 2], **options)

    wanted, tried = matched(0.3, 0.8, within=1e-6)
    assert list(tried) == [0.8, 0.4, 0.2, pytest.approx(0.3)]
    assert tried[0.8] < tried[0.4] < wanted < tried[0.2]
    summaries = [read_json(tmp_path / "pilot" / "like" / f"seed-{seed}" / "summary.json") for seed in (1, 2)]
    assert wanted == pytest.approx(sum(summary["calibration"]["temperature"] for summary in summaries) / 2, rel=1e-12)
    assert matched(0.3, 0.8, within=abs(tried[0.4] - wanted))[1] == {key: tried[key] for key in (0.8, 0.4)}
    with pytest.raises(ValueError, match="no strength has a temperature within"):
        matched(0.3, 0.8, within=1e-6, tries=2)
    with pytest.raises(ValueError, match=rf"the strongest, 0\.2, ends at {tried[0.2]:.4f}, not at {wanted:.4f}"):
        matched(0.3, 0.2, within=1e-6)
