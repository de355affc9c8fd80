"""Model cards after a command, and uploads: `export --push_to_hub` and `confidence --push_to_hub`."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sftmix.cli.parsing import OwnOption
from sftmix.cli.results import say
from sftmix.common.errors import ConfigError
from sftmix.config import RunConfig

if TYPE_CHECKING:
    from sftmix.tools.sharing.facts import Facts

SCORES = (
    OwnOption("push_to_hub", str | None, None, "NAME", "Upload the scores, without the rows, as a data set."),
    OwnOption("private", bool, False, "", "Make a repository that only its owner sees."),
    OwnOption("license", str | None, None, "NAME", "Licence of the scores, for their card."),
)
"""The options of `confidence` beside those of a run."""


def add_push_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--push_to_hub", metavar="NAME", help="upload the model to this repository of the hub")
    parser.add_argument("--private", action="store_true", help="make a repository that only its owner sees")
    what = "licence of the model, which follows from that of the base model and the data; --push_to_hub needs it"
    parser.add_argument("--license", metavar="NAME", help=what)


def check_push(name: str | None, license: str | None, *, private: bool) -> None:
    """Raise ConfigError for an option of an upload without one."""
    if name is None and (private or license is not None):
        given = "--private" if private else f"--license {license}"
        raise ConfigError(f"{given} is for an upload; give --push_to_hub NAME, too")


def write_run_cards(*runs: Path, config: RunConfig | None = None) -> None:
    """Write the cards of the models that runs have exported, as their files are now; rank 0 alone does.

    config  of the one run, where it is known
    """
    import os

    if os.environ.get("RANK", "0") != "0":
        return
    from sftmix.tools.sharing.written import write_cards

    for run in runs:
        write_cards(run, config)


def after_stage(config: RunConfig, until: str, parsed: Any) -> None:
    """Write the cards of the models that a run has exported, and upload the scores where this is asked for; rank 0."""
    import os

    run = Path(config.out or "")
    if until == "train":
        write_run_cards(run, config=config)
    if until != "confidence" or parsed.push_to_hub is None or os.environ.get("RANK", "0") != "0":
        return
    from sftmix.tools.sharing.hub import push
    from sftmix.tools.sharing.scores import write_scores

    with tempfile.TemporaryDirectory() as place:
        write_scores(run, Path(place), name=parsed.push_to_hub, license=parsed.license)
        print(push(Path(place), parsed.push_to_hub, kind="dataset", private=parsed.private))


def export(given: argparse.Namespace) -> None:
    """Write the model with its card, upload it where this is asked for, and print the place."""
    check_push(given.push_to_hub, None, private=given.private)
    if given.to is None and given.push_to_hub is None:
        raise ConfigError("--to is missing; name the directory to write, or a repository with --push_to_hub NAME")
    if given.push_to_hub is not None and given.license is None:
        raise ConfigError(
            f"--push_to_hub {given.push_to_hub} needs --license NAME: the licence of the model follows from that of "
            "its base model and of the data, which the program cannot know; as --license apache-2.0, or other"
        )
    if given.to is not None:
        export_to(given, Path(given.to))
        return
    with tempfile.TemporaryDirectory() as place:
        export_to(given, Path(place) / "model")


def export_to(given: argparse.Namespace, to: Path) -> None:
    """Write the model and its card into `to`, and upload it where this is asked for."""
    import shutil

    from sftmix.pipeline.export import export_run
    from sftmix.pipeline.finished import finished_models
    from sftmix.tools.sharing.facts import facts_of

    run = Path(given.run)
    facts = facts_of(run)
    chosen = given.step is not None or given.best or given.merge or given.dtype != "auto"
    if given.to is None and not chosen:
        (finished,) = finished_models(run, ["target"])
        shutil.copytree(finished.path, to)
        step = None
    else:
        export_run(run, to, checkpoint=given.step, best=given.best, dtype=given.dtype, merge=given.merge)
        step = _exported_step(given, run)
    _write_card(given, facts, to, step)
    if given.push_to_hub is None:
        print(to)
        return
    from sftmix.tools.sharing.hub import push

    say(f"export: {run} to {given.push_to_hub}")
    print(push(to, given.push_to_hub, kind="model", private=given.private))


def _write_card(given: argparse.Namespace, facts: Facts, to: Path, step: int | None) -> None:
    """Write the card of an export; a card that was copied with the model and edited before stays but for its licence.

    step  of the checkpoint that was exported; None: it is the model after the last step
    """
    from sftmix.tools.sharing.cards import CARD, model_card
    from sftmix.tools.sharing.written import write_card

    other = step if step is not None and not facts.is_last("train", step) else None
    write_card(to / CARD, model_card(facts, "train", license=given.license, step=other, merged=given.merge))


def _exported_step(given: argparse.Namespace, run: Path) -> int | None:
    """Return the step of the checkpoint that `export` takes; None for a run that keeps none."""
    from sftmix.common.checkpoints import BEST, CHECKPOINTS, steps_in
    from sftmix.pipeline.directory import origin

    if given.step is not None:
        return int(given.step)
    steps = steps_in(origin(run / "train") / (BEST if given.best else CHECKPOINTS))
    return max(steps, default=None)
