"""The rows of a run: read once, then tokenised for the target, and again for a reference with another tokenizer."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sftmix.components.component import Need, require
from sftmix.components.contracts import check_selection, read_only
from sftmix.config import RunConfig
from sftmix.config.wants import Wants
from sftmix.data import EncodedDataset, LoadedData, Prepared, encode_dataset, prepare
from sftmix.data.dataset import Texts
from sftmix.disk.files import MANIFEST, read_json
from sftmix.disk.tables import read_columns
from sftmix.model.compared import say_once
from sftmix.model.load import check_ids, fingerprint, load_tokenizer, model_config, refuse_quantized
from sftmix.model.paths import named
from sftmix.model.probes import context_length, position_border
from sftmix.options.data import LENGTHS
from sftmix.options.reference import ReferenceModel
from sftmix.pipeline.nodes import check_same
from sftmix.ranks.world import World
from sftmix.text.encoder import Encoder, encoder_for
from sftmix.text.templates import same_tokenizer
from sftmix.types import Scores
from sftmix.words.errors import ConfigError


class RunRows(NamedTuple):
    """The training and held-out rows of a run.

    prepared  the rows as read, before any tokenizer
    encoder   the target's tokenizer and chat template
    data      the selected rows, as the target sees them
    whole     all training rows, of which the selector keeps some
    """

    prepared: Prepared
    encoder: Encoder
    data: LoadedData
    whole: EncodedDataset

    @property
    def eval_fingerprint(self) -> str | None:
        """The identity of the held-out rows; None if there are none."""
        return self.data.eval.fingerprint if self.data.eval else None

    @property
    def packed(self) -> bool:
        """True if some row holds several documents."""
        return any(rows.packed for rows in (self.data.train, self.data.eval) if rows is not None)


def read_rows(config: RunConfig, world: World, *, run: Path | None = None) -> tuple[RunConfig, RunRows]:
    """Read the rows, tokenise them for the target, and keep those that the selector keeps.

    Return them with the configuration, whose `data.format` is now settled: text if `auto` recognised plain text. Also
    raises ConfigError for a renderer, a confidence or a reference that then lacks instructions and responses.

    run  a run directory, whose selection counts if it is finished; None: the selector is asked
    """
    prepared = world.node_first(lambda: prepare(config.data, config.seed, config.row_format))
    config = replace(config, data=prepared.options)
    path = config.model.path
    encoder = world.node_first(
        lambda: encoder_for(load_tokenizer(path), config.data, config.renderer, thinks=prepared.thinks)
    )
    alone = Need.RESPONSE_ALONE in config.confidence.needs or config.reference.response_alone
    if encoder.renderer.packs and alone:
        raise ConfigError(
            "windows (of plain text, or of your renderer) have no instructions, and a response is to be scored without "
            "its instruction: use --confidence Perplexity, without reference.response_alone"
        )
    refuse_quantized(path)  # before rows are tokenised and a reference is trained
    length = resolve_max_length(config.data.max_length, path, key="data.max_length")

    def encoded(keep: Sequence[str] | None = None) -> LoadedData:
        return world.node_first(lambda: encode_dataset(prepared, encoder, max_length=length, keep=keep))

    data = encoded()
    whole = data.train  # what the selector sees; what it keeps is encoded as a data set of its own
    if Wants(config).selection and not (run and _chose_later(run, config)):
        data = encoded(world.from_main(lambda: selected_ids(config, whole, run)))
        chosen = f"{len(data.train):,} of {len(whole):,} examples selected by {config.selector}"
        data.report.notes.append(chosen)
    check_rows_fit(path, encoder, whole, data.eval)
    rows = RunRows(prepared, encoder, data, whole)
    of_rows = {"data.train": data.train.fingerprint, "data.eval": rows.eval_fingerprint}
    check_same(lambda: {**of_rows, "model.path": fingerprint(path)}, world)
    return config, rows


def _chose_later(run: Path, config: RunConfig) -> bool:
    """Return True if the selector is one that chose after the scoring, in this run.

    A command that only reads a run may have a stand-in for the selector, without its needs.
    """
    file = run / "choice" / "inputs.json"
    chose = read_json(file, selector=dict)["selector"] if file.exists() else {}
    return bool(chose.get("class_path") == config.selector.spec()["class_path"])


def check_rows_fit(path: str, encoder: Encoder, *sides: EncodedDataset | None) -> None:
    """Raise ConfigError if rows, or what ends them, have a token without an embedding in a model; no weight is read."""
    ids = [encoder.pad_id, *encoder.stop_ids, *(rows.highest_id for rows in sides if rows)]
    check_ids(model_config(path), encoder.tokenizer, ids)


def check_same_ids(path: str, encoder: Encoder) -> None:
    """Raise ConfigError for a model whose own tokenizer, if it has one, gives token ids another meaning."""
    try:
        own = {number: token for token, number in load_tokenizer(path).get_vocab().items()}
    except ConfigError:  # a directory of weights alone is taken at its word
        return
    for token, number in encoder.tokenizer.get_vocab().items():
        if own.get(number, token) != token:
            raise ConfigError(
                f"model.path: {path} has another tokenizer than the rows: {number} is {own[number]!r} there, and "
                f"{token!r} here; score it in a run of its own"
            )


def selected_ids(config: RunConfig, rows: EncodedDataset, run: Path | None = None) -> list[str]:
    """Return the ids that the selector keeps, or kept in a run directory, in file order."""
    if run is not None and (run / "selection" / MANIFEST).exists():
        selected = read_columns(run / "selection" / "selected.parquet", "id")["id"]
        if not set(selected).isdisjoint(rows.ids):  # rows that are all other ones are refused later, by their files
            return selected
    chosen = config.selector.select(read_only(table_of(rows)), seed=config.seed)
    return [rows.ids[row] for row in check_selection(config.selector, chosen, len(rows))]


def table_of(rows: EncodedDataset, confidence: Path | None = None) -> Scores:
    """Return the table that splitters, pair samplers and selectors see.

    confidence  file of the confidence; None: confidence and variability are NaN
    """
    values = spread = np.full(len(rows), np.nan)
    if confidence is not None:
        table = read_columns(confidence, "id", "confidence", "variability", of=rows.ids)
        values, spread = table["confidence"], table["variability"]
    return Scores(
        id=rows.ids,
        row=np.arange(len(rows), dtype=np.int64),
        confidence=values,
        variability=spread,
        n_tokens=rows.n_targets,
        label=rows.labels,
        columns=rows.columns,
        texts=Texts(rows),
    )


def resolve_max_length(requested: int | None, model_path: str, *, key: str) -> int:
    """Return the most tokens of an example: as requested, or the smaller of 2,048 and the model's context."""
    config = model_config(model_path)
    context, border = context_length(config), position_border(config)  # Phi-3 mini 128k: 131072 and 4096
    length = min(2048, context or 2048) if requested is None else requested  # context None: config.json names none
    require(length >= 2, key, length, LENGTHS)
    if context is not None and length > context:
        raise ConfigError(f"{key} is {length}, but {model_path} has a context of {context} tokens")
    if length > border:
        say_once(
            f"{key} is {length}: a row of more than {border} tokens changes the positions of all rows in its batch, as "
            f"RoPE of this model goes by the longest, so losses depend on the batches; with {key} {border} they do not"
        )
    return length


def rows_of_reference(
    config: RunConfig,
    rows: RunRows,
    model: ReferenceModel,
    world: World,
    *,
    key: str = "reference.model.path",
    say: Callable[[str], object] = lambda line: None,
) -> tuple[Encoder, EncodedDataset]:
    """Return encoder and rows of a reference; lines say how it reads rows of its own.

    What is not set is the run's if the tokenizer is the target's: the confidence is then about the tokens which
    the target sees. With another tokenizer, template and length have another meaning, so they are the model's. Windows
    of plain text are always the run's, as they join by what they hold: ConfigError for a reference that would cut
    others.

    key  the option that names the model, beside the options of its template and length
    """
    path, encoder, length = model.path or config.model.path, rows.encoder, rows.data.report.max_length or 0
    if model == ReferenceModel(lora=model.lora):  # nothing set beside adapters: the rows are the target's
        return encoder, rows.data.train
    option = key.rpartition(".")[0]
    with named(key if model.path else "model.path"):
        tokenizer = world.node_first(lambda: load_tokenizer(path))
        same = world.share(same_tokenizer(tokenizer, rows.encoder.tokenizer))
        if model.template is not None or not same:
            data = replace(config.data, template=model.template)
            with named(f"{option}.template", "data.template"):
                encoder = world.node_first(
                    lambda: encoder_for(tokenizer, data, config.renderer, thinks=rows.prepared.thinks)
                )
        if model.max_length is None and same:
            length = min(length, context_length(model_config(path)) or length)
        else:
            length = resolve_max_length(model.max_length, path, key=f"{option}.max_length")
    say(f"reference ({path}): template {encoder.name}, max_length {length}")
    # Such as a smaller model of the target's family, whose context is long enough.
    if encoder is rows.encoder and length == rows.data.report.max_length:
        return encoder, rows.data.train
    if rows.encoder.renderer.packs:
        raise ConfigError(
            "a reference reads the windows of the target (of plain text, or of your renderer): leave "
            "reference.model.template and reference.model.max_length out, and use a reference with the target's "
            "tokenizer and context"
        )
    encoded = world.node_first(
        lambda: encode_dataset(
            rows.prepared,
            encoder,
            max_length=length,
            keep=rows.data.train.ids,  # what the target dropped is not the reference's, either
        )
    )
    check_same(lambda: {option: encoded.train.fingerprint}, world)
    for line in encoded.report.lines():
        say(f"reference ({path}): {line}")
    return encoder, encoded.train
