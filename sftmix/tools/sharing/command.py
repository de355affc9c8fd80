"""`export`, the uploads of `export` and `confidence`, and the model cards that other commands leave behind."""

import argparse
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from sftmix.cli.parsing import OwnOption
from sftmix.cli.results import say
from sftmix.common.errors import ConfigError
from sftmix.common.files import MANIFEST, naming_full_disk, read_json, remove_leftovers
from sftmix.common.places import is_there
from sftmix.config import RunConfig
from sftmix.tools.runs.models import DTYPES, finished_models
from sftmix.tools.runs.read import refuse_no_run

SCORES = (
    OwnOption("push_to_hub", str | None, None, "NAME", "Upload the scores, without the rows, as a data set."),
    OwnOption("private", bool, False, "", "Make a repository that only its owner sees."),
    OwnOption("license", str | None, None, "NAME", "Licence of the scores, for their card."),
)
"""The options of `confidence` beside those of a run."""

ABOUT = """Write a checkpoint of a run as a Hugging Face model directory: weights, tokenizer, template, stop ids.

  sftmix export runs/first --to my-model
  sftmix export runs/first --to my-model-at-200 --step 200 --dtype bfloat16
  sftmix export runs/lora --to my-model --merge
  sftmix export runs/first --push_to_hub OWNER/NAME --license llama3.1

For a run with adapters it writes the adapters, as PEFT does, or with --merge the whole model. A model card, README.md,
is written beside the weights. --push_to_hub without --to uploads train/model, or the checkpoint that is named."""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="run directory")
    parser.add_argument("--to", metavar="DIR", help="directory to write; it must not exist yet")
    parser.add_argument("--step", type=int, metavar="N", help="optimizer step of the checkpoint [the newest]")
    parser.add_argument(
        "--best",
        action="store_true",
        help="the weights of the best held-out evaluation, of a run with --checkpoint.keep_best true",
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="auto",
        help="dtype of the weights; auto: as the base model was stored, adapters float32 [%(default)s]",
    )
    parser.add_argument("--merge", action="store_true", help="put the adapters of a LoRA run into the model's weights")
    parser.add_argument("--push_to_hub", metavar="NAME", help="upload the model to this repository of the hub")
    parser.add_argument("--private", action="store_true", help="make a repository that only its owner sees")
    parser.add_argument(
        "--license",
        metavar="NAME",
        help="licence of the model, which follows from that of the base model and the data; --push_to_hub needs it",
    )


def main(args: argparse.Namespace) -> None:
    """Write the model with its card, upload it if this is asked for, and print the place."""
    _check(args)
    from sftmix.common.files import BEST, CHECKPOINTS, read_steps, steps_in
    from sftmix.pipeline.stages import is_finished, origin
    from sftmix.tools.runs.export import export_run
    from sftmix.tools.runs.read import check_finished

    run, step = Path(args.run), args.step
    refuse_no_run(run)
    check_finished(run)
    with tempfile.TemporaryDirectory() as place:
        final = Path(args.to or f"{place}/model")
        if is_there(final):
            raise ConfigError(f"{final} exists; name a directory that does not")
        remove_leftovers(final.parent, final.name)  # of an export that was killed
        to = final.with_name(f".tmp-{final.name}.{os.getpid()}")
        if step is None and not (args.to or args.best or args.merge) and args.dtype == "auto":
            _copy_model(run, to)
        else:
            export_run(run, to, checkpoint=step, best=args.best, dtype=args.dtype, merge=args.merge)
            steps_dir = origin(run / "train") / (BEST if args.best else CHECKPOINTS)
            step = step or max(steps_in(steps_dir), default=None)  # None: merged from the model after the last step
            if is_finished(run / "train") and step == read_steps(run / "train")[-1]["step"]:
                step = None
        measured = step is None and not args.merge and args.dtype == "auto"
        if not measured:
            say("these are not the weights of train/model, as the run measured them: it has no figures of these")
        from sftmix.tools.sharing.cards import CARD, model_card, write_card  # import torch, which no refusal waits for

        card = model_card(run, "train", license=args.license, step=step, merged=args.merge, measured=measured)
        write_card(to / CARD, card, args.license)
        to.rename(final)  # with its card
        print(push(final, args.push_to_hub, kind="model", private=args.private) if args.push_to_hub else final)


def _check(args: argparse.Namespace) -> None:
    """Raise ConfigError for options that miss one another."""
    if not (args.to or args.push_to_hub):
        raise ConfigError("--to is missing; name the directory to write, or a repository with --push_to_hub NAME")
    check_upload(args, "private")
    if args.push_to_hub and not args.license:
        raise ConfigError(
            f"--push_to_hub {args.push_to_hub} needs --license NAME: the licence of the model follows from that of "
            "its base model and of the data, which the program cannot know; as --license apache-2.0, or other"
        )


def _copy_model(run: Path, to: Path) -> None:
    """Copy the files of train/model that the run has listed, and its card; others there are not of the run."""
    stage = Path(finished_models(run)[0].path).parent
    names = {"model/README.md", *read_json(stage / MANIFEST, files=dict)["files"]}
    files = [stage / name for name in names if name.startswith("model/") and (stage / name).exists()]
    with naming_full_disk(to, sum(file.stat().st_size for file in files)):
        for file in files:
            (copy := to / file.relative_to(stage / "model")).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, copy)


def check_upload(options: Any, *names: str) -> None:
    """Raise ConfigError for options that say how to upload if nothing is uploaded."""
    for name in names if not options.push_to_hub else ():
        if value := getattr(options, name):
            raise ConfigError(
                f"--{name} ({value}) is for an upload, and there is none: name it with --push_to_hub NAME"
            )


def push(directory: Path, name: str, *, kind: str, private: bool) -> str:
    """Upload a directory to a repository of the hub, made if it is not there; return the address of the commit.

    kind     model or dataset
    private  of a new repository; one that is there stays as it is
    HF_ENDPOINT names the hub, `hf auth login` or HF_TOKEN the user. Raises ConfigError with the hub's reason.
    """
    from huggingface_hub import HfApi

    hub = HfApi()
    try:
        hub.create_repo(name, repo_type=kind, private=private, exist_ok=True)
        done = hub.upload_folder(repo_id=name, folder_path=directory, repo_type=kind)
    except (OSError, ValueError) as error:  # huggingface_hub's errors are of these kinds
        raise ConfigError(
            f"--push_to_hub {name}: {' '.join(str(error).split())}; is the name OWNER/NAME, and are you logged in "
            "(hf auth login)?"
        ) from error
    return str(done.commit_url)


def write_run_cards(*runs: Path) -> None:
    """Write the cards of train/model and baseline/model as the files of each run are now; rank 0 alone does.

    A stage without a model gets none, and a card that was edited stays.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    from sftmix.tools.sharing.cards import CARD, model_card, write_card

    for run in runs:
        for stage in ("train", "baseline"):
            file = run / stage / "model" / CARD
            remove_leftovers(file.parent, CARD)  # of a stage that is done nobody else would
            if file.parent.is_dir():
                write_card(file, model_card(run, stage))


def after_stage(config: RunConfig, until: str, values: Any) -> None:
    """Write the cards of the models that a run has exported, and upload the scores if this is asked for; rank 0."""
    run = Path(config.out or "")
    if until == "train":
        write_run_cards(run)
    if until != "confidence" or not values.push_to_hub or os.environ.get("RANK", "0") != "0":
        return
    from sftmix.tools.sharing.cards import write_scores

    with tempfile.TemporaryDirectory() as place:
        write_scores(run, Path(place), name=values.push_to_hub, license=values.license)
        print(push(Path(place), values.push_to_hub, kind="dataset", private=values.private))
