"""`evaluate`: benchmarks on the models of a run by lm-eval, in one table."""

from importlib.util import find_spec
from pathlib import Path

from sftmix.cli.say import say
from sftmix.disk.places import unwritable
from sftmix.tools.evaluate.harness import Options, find_tasks, measure_tasks
from sftmix.tools.evaluate.table import MODELS, write_tables
from sftmix.tools.runs.models import finished_models
from sftmix.tools.runs.read import is_run
from sftmix.words.errors import ConfigError

ABOUT = """Measure the models of a run on benchmarks, by lm-eval: one table of tasks x models with standard errors.
Results go to RUN/evaluation; what is there with the same settings is not measured again.

  sftmix evaluate runs/first --tasks arc_easy,hellaswag --models base,target --limit 200
  sftmix evaluate my-model --tasks arc_easy --to results
  sftmix evaluate runs/first --tasks mine --include_path my_tasks

Tasks are lm-eval's, by name, and files of --include_path.
It needs lm-eval: pip install -e '.[eval]' in the checkout."""


def main(args: Options) -> None:
    """Measure models on what they were not measured on, and print the table of all results there."""
    run = Path(args.place).expanduser()
    of_run = is_run(run)
    if not (args.to or of_run):
        raise ConfigError("--to is missing; name the directory of the results")
    _check_numbers(args)
    usual = ["target"]
    if of_run:
        usual = [name for name in MODELS if name != "baseline" or (run / "baseline" / "figures.json").exists()]
    models = finished_models(args.place, args.models.split(",") if args.models else usual)
    place = Path(args.to or run / "evaluation")
    if problem := unwritable(place, folder=True):
        raise ConfigError(f"--to {place} {problem}")
    if find_spec("lm_eval") is None:
        raise ConfigError("evaluate needs lm-eval, which is not installed: pip install -e '.[eval]' in the checkout")
    if not (names := [*filter(None, map(str.strip, args.tasks.split(",")))]):
        raise ConfigError(f"no task is named in {args.tasks!r}; name tasks of lm-eval, with commas between them")
    manager, files = find_tasks(names, args.include_path)
    # In another directory base, baseline and target may be those of another run: only what is measured now counts.
    elsewhere = place.resolve() != (run / "evaluation").resolve()
    measured = dict.fromkeys(MODELS, "") if of_run and elsewhere else {}
    measured |= {model.name: measure_tasks(model, names, manager, files, place, args) for model in models}
    print(write_tables(place, measured))
    if not elsewhere:
        from sftmix.tools.sharing.command import write_run_cards

        write_run_cards(run)
    say(f"all results: {place}, table.md and table.json among them")


def _check_numbers(args: Options) -> None:
    """Raise ConfigError for a number out of range."""
    for name, least in (("limit", 1), ("num_fewshot", 0), ("batch_size", 1)):
        if (value := getattr(args, name)) is not None and value < least:
            raise ConfigError(f"--{name} is {value}; allowed: {least} and above")
