"""The card of a model and that of shared scores: README.md, as the hub shows it.

The card of train/model and baseline/model is written by the command line when a run has ended, and that of an export by
`export`: stages know nothing of cards. README.md is not in a stage's manifest, so users may edit it; the stage stays
valid.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import yaml
from huggingface_hub import DatasetCard, DatasetCardData, EvalResult, ModelCard, ModelCardData

import sftmix
from sftmix.data.report import REASONS
from sftmix.tools.sharing.facts import Facts
from sftmix.tools.sharing.text import escaped, fenced, table

CARD = "README.md"
ARMS = {"train": "SFTMix target", "baseline": "NTP baseline"}
LICENSE_TO_FILL = (
    "**TO BE FILLED IN**: the licence of this model. It follows from that of the base model and of the data"
)
METRICS = {
    "eval_nll_after": "held-out NLL, nats per response token",
    "eval_accuracy": "held-out accuracy, next token",
    "eval_exact_match": "held-out exact match, responses",
}
PAPER = """@inproceedings{xiao2026sftmix,
  title         = {SFTMix: Elevating Language Model Instruction Tuning with Mixup Recipe},
  author        = {Xiao, Yuxin and Zhang, Shujian and Zhou, Wenxuan and Ghassemi, Marzyeh and Zhao, Sanqiang},
  booktitle     = {Proceedings of the Annual Meeting of the Association for Computational Linguistics},
  year          = {2026},
  url           = {https://aclanthology.org/2026.acl-long.78},
  eprint        = {2410.05248},
  archivePrefix = {arXiv}
}"""


def model_card(
    facts: Facts,
    stage: str,
    *,
    license: str | None = None,
    step: int | None = None,
    merged: bool = False,
) -> ModelCard:
    """Return the card of a model of a run.

    stage   train or baseline
    step    of the checkpoint that the weights are; None: those after the last step, which the run has measured
    merged  of a run with adapters: these are in the model's weights
    """
    arm = facts.arm(stage) if step is None else facts.figures_at(stage, step)
    which = "after the last step" if step is None else f"at step {step}"
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type="held-out",
            dataset_name="held-out rows of the run",
            metric_type=key,
            metric_value=arm[key],
            metric_name=name,
        )
        for key, name in METRICS.items()
        if isinstance(arm.get(key), float)
    ]
    data = ModelCardData(
        license=license,
        base_model=facts.base_model if facts.base_on_hub else None,
        library_name="peft" if facts.config.model.lora.r and not merged else "transformers",
        pipeline_tag="text-generation",
        tags=["sftmix"],
        model_name=facts.run.resolve().name,
        eval_results=results or None,
    )
    objective = type(facts.config.objective).__name__ if stage == "train" else "NTP"
    parts = [
        f"# {escaped(facts.run.resolve().name)}: {ARMS[stage]}",
        f"{escaped(facts.base_model)}, fine-tuned by [SFTMix](https://arxiv.org/abs/2410.05248) {_version(facts)} with "
        f"the objective {escaped(objective)}; the weights {escaped(which)}.",
        "## Licence\n\n" + (escaped(license) if license else f"{LICENSE_TO_FILL} ({escaped(facts.base_model)})."),
        "## Data\n\n" + _data(facts),
        "## Results\n\n" + (_results(facts, stage) if step is None else _results_at(arm)),
        "## Not measured\n\n" + _not_measured(facts.benchmarked(stage) and step is None, arm),
        "## Recipe\n\n" + fenced(yaml.safe_dump(facts.recipe(stage), sort_keys=False, allow_unicode=True)),
        "## Versions\n\n" + table([["package", "version"], *_versions(facts)]),
        f"## Citation\n\n```bibtex\n{PAPER}\n```",
    ]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n")


def scores_card(
    facts: Facts, *, rows: int, columns: Sequence[str], name: str = "OWNER/NAME", license: str | None = None
) -> DatasetCard:
    """Return the card of shared scores: their meaning, their reference, and how they are read back.

    columns  of dynamics.parquet, with their units
    name     of the repository on the hub
    """
    data = DatasetCardData(license=license, tags=["sftmix", "training-dynamics"], pretty_name="SFTMix scores")
    reference = type(facts.config.reference).__name__
    parts = [
        f"# Scores of {escaped(', '.join(facts.files_of_rows))}",
        f"Training dynamics and confidence of {rows:,} instruction rows, as a reference model saw them (SFTMix, arXiv "
        "2410.05248). The rows themselves are not here: each is named by its id and by a hash of its text. A hash does "
        "not hide a text that can be guessed, and ids are those of the rows.",
        "If you have the rows, you can train with these scores, without a reference of your own:\n\n"
        "```bash\nsftmix run --model.path MODEL --data.train ROWS --reference FromFile \\\n"
        f"  --reference.path hub:{name} --out runs/first\n```\n\n"
        "A training row without a score is refused. So take and hold out the same rows: `seed`, and the options of "
        "`data` stand in the recipe below.",
        table(
            [
                ["file", "columns"],
                ["dynamics.parquet", ", ".join(columns)],
                ["confidence.parquet", "id, confidence (higher: more confident), variability (of the perplexity)"],
                ["rows.parquet", "id, hash (of the turns of the row)"],
            ]
        ),
        f"The confidence is that of `{type(facts.config.confidence).__name__}`. "
        + escaped((type(facts.config.confidence).__doc__ or "").partition("\n")[0]),
        "## Data\n\n" + _data(facts),
        f"## Reference\n\n{escaped(reference)}, with the options below. Where they name no model, it is that of "
        f"the run, {escaped(facts.base_model)}.\n\n"
        + fenced(yaml.safe_dump(facts.recipe("reference"), sort_keys=False, allow_unicode=True)),
        "## Licence\n\n" + (escaped(license) if license else "**TO BE FILLED IN**: the licence of these scores."),
        "## Versions\n\n" + table([["package", "version"], *_versions(facts)]),
        f"## Citation\n\n```bibtex\n{PAPER}\n```",
    ]
    return DatasetCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n")


# ---------------------------------------------------------------------------------------------- parts


def _version(facts: Facts) -> str:
    revision = facts.summary.get("git_revision")
    return escaped(facts.summary.get("version", sftmix.__version__)) + (f" ({escaped(revision)})" if revision else "")


def _versions(facts: Facts) -> list[list[Any]]:
    """Return the versions: SFTMix as it trained, the others as they are where the card is written."""
    others = [[name, version(name)] for name in ("torch", "transformers", "huggingface_hub")]
    return [["sftmix", facts.summary.get("version", sftmix.__version__)], *others]


def _data(facts: Facts) -> str:
    data = facts.summary.get("data") or {}
    rows: list[list[Any]] = [["", ""], ["files", ", ".join(facts.files_of_rows)]]
    for key, name in (("rows", "rows read"), ("train", "training examples"), ("eval", "held-out examples")):
        if data.get(key) is not None:
            rows.append([name, f"{data[key]:,}"])
    if isinstance(sizes := facts.config.data.take, list):  # the options make a list of a single number
        rows.insert(2, ["rows taken (data.take)", ", ".join("all" if size is None else str(size) for size in sizes)])
    rows += [[REASONS[key].replace("{s}", "s"), f"{count:,}"] for key, count in (data.get("counts") or {}).items()]
    return table([*rows, ["fingerprint of the training examples", facts.data_hash]])


def _results(facts: Facts, stage: str) -> str:
    arm, before = facts.arm(stage), facts.summary.get("eval_nll_before")
    rows: list[list[Any]] = [["metric", "this model", "over seeds"]]
    several = False
    for key, name in METRICS.items():
        if isinstance(arm.get(key), float):
            spread = facts.over_seeds(key) if stage == "train" else None
            several = several or spread is not None
            told = f"{spread['mean']:.4f}, sd {spread['sd']:.4f}, {spread['seeds']} seeds" if spread else "one seed"
            rows.append([name, f"{arm[key]:.4f}", told])
    parts = [table(rows)] if len(rows) > 1 else ["Nothing was held out."]
    if isinstance(before, float):
        parts.append(f"The base model's held-out NLL before training: {before:.4f}.")
    other = facts.arm("baseline").get("eval_nll_after") if stage == "train" else None
    if isinstance(other, float):
        parts.append(f"The held-out NLL of the NTP baseline, trained on the same rows with the same seed: {other:.4f}.")
    if not several:
        parts.append("These are figures of one seed: they say nothing of how much another seed would change.")
    if facts.benchmarks is not None:
        parts.append(table(facts.benchmarks["table"]))
        parts += [f"- {escaped(sentence)}" for sentence in facts.benchmarks["sentences"]]
    return "\n\n".join(parts)


def _results_at(figures: Mapping[str, Any]) -> str:
    """Return the results of another checkpoint than the last: the run's own, its spread and benchmarks are not its."""
    rows: list[list[Any]] = [[name, f"{figures[key]:.4f}"] for key, name in METRICS.items() if key in figures]
    return table([["metric", "this model"], *rows]) if rows else "Nothing was measured for these weights."


def _not_measured(benchmarked: bool, figures: Mapping[str, Any]) -> str:
    lines = ["answers judged by people or by a model (MT-Bench, AlpacaEval)"]
    lines += [] if benchmarked else ["benchmarks"]
    lines += ["held-out rows"] if figures.get("eval_nll_after") is None else []
    lines += ["harmful, false or private content in answers", "languages other than those of the rows"]
    return "\n".join(f"- {line}" for line in lines)
