"""Every variant of a table is checked before its first run, also by what options alone do not show."""

from typing import Any

import pytest
import yaml

from tests.fast import some_fast

VARIANTS = {"NTP": {"objective": "NTP"}, "SFTMix": {}}
ONLINE = {"reference": "Online", "objective": "SFTMix"}
LATE: dict[str, tuple[dict[str, Any], str]] = {
    "one epoch": ({**ONLINE, "training.max_steps": None, "training.epochs": 1}, "needs a second epoch"),
    "part of an epoch": ({**ONLINE, "training.max_steps": None, "training.epochs": 0.5}, "needs a second epoch"),
    "steps of one epoch": (ONLINE, "needs a second epoch"),
    "a layer that is not there": (
        {"objective": {"class_path": "ManifoldMixup", "init_args": {"layers": [9]}}},
        "layer",
    ),
    "beyond the context": ({"data.max_length": 100_000}, "has a context of 128 tokens"),
    "more rows than there are": ({"selector": {"class_path": "Random", "init_args": {"k": 999}}}, "selector.k is 999"),
}


@pytest.mark.parametrize("name", some_fast(LATE, every=2))
def test_every_variant_is_checked_before_the_first_run(plain, sftmix, tmp_path, name):
    """What only rows and the model's config.json show ends the table before it has trained anything."""
    late, expected = LATE[name]
    (tmp_path / "variants.yaml").write_text(yaml.safe_dump({"variants": {**VARIANTS, "late": late}}, sort_keys=False))
    small = ("--training.max_steps", "3", "--seeds", "[1, 2]", "--out", str(tmp_path / "table"))
    options = [*plain.bare, *small] if "reference" in late else [*plain.options, *small]
    done = sftmix("compare", *options, "--config", str(tmp_path / "variants.yaml"))
    assert (done.code, "error: variant late, seed 1: " in done.err, expected in done.err) == (2, True, True), done.err
    assert not any((tmp_path / "table").glob("*/seed-*"))
