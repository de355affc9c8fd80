"""The example of docs/compare.md: the arms have one order, and a table that is made of them says so."""

import re
from pathlib import Path

import yaml

from sftmix.disk.files import read_json

PAGE = Path(__file__).parents[3] / "docs" / "compare.md"


def test_the_variants_of_the_page_differ_in_their_objective_alone(plain, sftmix, tmp_path):
    (block,) = (text for text in re.findall(r"```yaml\n(.*?)```", PAGE.read_text(), re.S) if "variants:" in text)
    variants = yaml.safe_load(block)["variants"]
    (tmp_path / "variants.yaml").write_text(yaml.safe_dump({"variants": variants}, sort_keys=False))
    words = ("--config", str(tmp_path / "variants.yaml"), "--training.max_steps", "2", "--checkpoint.every", "0")
    done = sftmix("compare", *plain.options, *words, "--seeds", "[1]", "--out", str(tmp_path / "table"))
    assert done.code == 0, done.err
    found = {one["ours"]: one["inputs_that_differ"] for one in read_json(tmp_path / "table/table.json")["contrasts"]}
    assert found == {"SFTMix": ["objective"], "mu-0.4": ["objective"]}
