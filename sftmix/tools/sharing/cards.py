"""The cards of a model and of shared scores, README.md as the hub shows it, made from the files of a run.

What a card says is in model.md and scores.md. Every value in it is escaped, so that names from data cannot become
markup, and directories of this machine are left out.

A card is no output of a stage, so users may edit it. The last line of one that is written here is a comment with the
hash of the text above it, by which an edited card is told apart from one that may be written again.
"""

import hashlib
import html
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import DatasetCardData, EvalResult, ModelCardData
from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup

import sftmix
from sftmix.disk.files import naming_damage, write_text
from sftmix.disk.places import HUB_ID, is_there, place_of
from sftmix.disk.regular import keep_within, regular
from sftmix.disk.tables import read_dynamics, write_dynamics, write_table
from sftmix.disk.texts import read_text
from sftmix.pipeline.signature import is_own
from sftmix.pipeline.start import made_from
from sftmix.tools.evaluate.table import results_of
from sftmix.tools.runs.read import as_started, read_finished, read_json_if_there
from sftmix.tools.runs.rows import rows_of_run
from sftmix.types import OF_TOKENS
from sftmix.words.given import as_list

CARD = "README.md"
METRICS = {
    "eval_nll_after": "NLL, nats per response token",
    "eval_accuracy": "accuracy, next token",
    "eval_exact_match": "exact match, responses",
}
_SEAL = "\n<!-- sha256 of the text above, which this program wrote: "


def model_card(
    run: Path,
    stage: str,
    *,
    license: str | None = None,
    step: int | None = None,
    merged: bool = False,
    measured: bool = True,
) -> str:
    """Return the card of a model of a run.

    stage     train or baseline
    step      of the checkpoint that the weights are; None: those after the last step
    merged    of a run with adapters: these are in the model's weights
    measured  False: the weights are not those that the run has measured, so the card has no figures of them
    """
    config, summary = read_finished(run), read_json_if_there(run / "summary.json")
    baseline = summary.get("baseline") or {}
    figures = {} if step is not None or not measured else summary if stage == "train" else baseline
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type="held-out",
            dataset_name="held-out rows of the run",
            metric_type=key,
            metric_value=figures[key],
            metric_name=words,
        )
        for key, words in METRICS.items()
        if isinstance(figures.get(key), float)
    ]
    from_hub = "@" in made_from(run)["model"]  # gpt2@607a30d7...; a local model has a hash, and no page to link to
    data = ModelCardData(
        license=license,
        base_model=config.model.path if from_hub else None,
        library_name="peft" if config.model.lora.r and not merged else "transformers",
        pipeline_tag="text-generation",
        tags=["sftmix"],
        model_name=run.resolve().name,
        eval_results=results or None,
    )
    values = {"step": step, "figures": figures, "baseline": baseline, "evaluation": results_of(run)}
    return _card("model.md", run, data, stage=stage, **values)


def write_scores(run: Path, to: Path, *, license: str | None = None) -> None:
    """Write the scores of a data set without its text into `to`: dynamics, confidence, hashes of rows, and the card.

    What was kept of single tokens, and states, are left out: they give away too much of a text. Raises DataError for a
    run without dynamics.
    """
    keep_within(run)
    folder, rows = run / "confidence", rows_of_run(run)[1].data.train
    private: dict[str, Any] = dict.fromkeys((*OF_TOKENS, "states"))
    dynamics = replace(read_dynamics(folder / "dynamics.parquet"), **private)
    write_dynamics(to / "dynamics.parquet", dynamics)
    shutil.copy(regular(folder / "confidence.parquet"), to)
    # By the hash of their texts others match these rows with theirs, whatever the ids.
    write_table(to / "rows.parquet", rows.ids, hash=rows.content_hashes())
    data = DatasetCardData(license=license, tags=["sftmix", "training-dynamics"], pretty_name="SFTMix scores")
    card = _card("scores.md", run, data, rows=len(rows.ids), alone=dynamics.alone_nll_sum is not None)
    write_text(to / CARD, card)


def write_card(file: Path, card: str) -> None:
    """Write the card, unless there is an edited one."""
    try:
        text = read_text(file) if file.exists() else ""
    except ValueError:  # edited, and saved in another encoding
        return
    # Nobody edited a card whose text has the hash that is under it.
    if text in ("", _sealed(text.rpartition(_SEAL)[0])):
        write_text(file, _sealed(card))


def _sealed(card: str) -> str:
    return f"{card}{_SEAL}{hashlib.sha256(card.encode()).hexdigest()} -->\n"


def without_directories(value: Any) -> Any:
    """Return an option's value with every path cut to its name, whether or not it is here; hub ids and texts stay."""
    if isinstance(value, dict):
        return {name: without_directories(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [without_directories(inner) for inner in value]
    if not isinstance(value, str) or "/" not in value:
        return value
    # "openai/gsm8k:main@train[:10%]" -> openai/gsm8k; the last ":" of C:/rows is before a "/", so it stays.
    name = re.sub(r":[^:/\\]+\Z", "", value.partition("@")[0])  # of NAME:SUBSET@SPLIT
    # secret/place may be an id as well: a path only if it is there.
    on_hub = HUB_ID.match(name.removeprefix("hub:")) and not is_there(place_of(name))
    # These endings make NAME/NAME a path: an id of the hub may also have a dot.
    endings = r"\.(jsonl?|csv|tsv|parquet|arrow|gz|bz2|xz|zst|jinja|txt)$"
    # A relative path with such characters is known by its ending, or because it is there.
    is_text = re.search(r"[\s<>|{}]", value) and not re.match(r"[/~.]|\w:/", value)
    is_path = is_there(place_of(value)) or re.search(endings, value.lower()) or not (on_hub or is_text)
    return Path(value).name or value if is_path else value  # /data/rows.jsonl -> rows.jsonl; "/" stays


def _card(template: str, run: Path, data: Any, **values: Any) -> str:
    """Return the card of a template; the metadata, the configuration and the summary are also values of it.

    data  the metadata, of a model or of a data set
    """
    config = read_finished(run)
    with as_started(run if is_own(run) else None):
        shown = without_directories(config.as_dict())
    shown.pop("out", None)  # a place on this machine
    folder = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=folder, autoescape=True, finalize=_escaped, trim_blocks=True)
    with naming_damage(run / "summary.json"):
        return environment.get_template(template).render(
            values,
            data=data,
            header=Markup(data.to_yaml()),  # not escaped: huggingface_hub writes YAML
            config=config,
            summary={"version": sftmix.__version__, **read_json_if_there(run / "summary.json")},
            base=shown["model"]["path"],
            files=as_list(shown["data"]["train"]),
            recipe=Markup(yaml.safe_dump(shown, sort_keys=False, allow_unicode=True)),
        )


def _escaped(value: Any) -> Markup:
    """Return a value as one line of text: no markup, no HTML, no end of a table's cell."""
    if isinstance(value, Markup):
        return value
    # "[x](y)|<b>" -> "\[x\]\(y\)\|&lt;b&gt;".
    line = " ".join(str(value).split())
    return Markup(re.sub(r"([\\`*_{}\[\]()#+!|~$])", r"\\\1", html.escape(line, quote=False)))
