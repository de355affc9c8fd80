"""The options of each part as plain dataclasses; the command line shows them under `--model.*`, `--data.*`, ...

`sftmix.config.RunConfig` composes them with the components. A field's docstring is its help text.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from sftmix.common.fields import ROLES, column_problems
from sftmix.common.plain import PlainFields, as_list

SpecialTokens = Literal["text", "tokens"]
Thoughts = Literal["train", "mask", "drop"]
ScheduleName = Literal["cosine", "linear", "constant"]
Precision = Literal["auto", "fp32", "bf16"]
Parallel = Literal["auto", "ddp", "fsdp", "hsdp"]

SHARDED = ("fsdp", "hsdp")
"""The values of training.parallel under which ranks share the weights."""


Check = tuple[str, Callable[[Any], bool], str]
"""Name of an option, a test that is True for allowed values, and the allowed values in words."""


def out_of_range(prefix: str, options: object, checks: tuple[Check, ...]) -> Iterator[str]:
    """Yield one sentence for each option that is set (not None) and out of its range."""
    for name, allowed, words in checks:
        value = getattr(options, name, None)
        if value is not None and not allowed(value):
            yield f"{prefix}.{name} is {value!r}; allowed: {words}"


def at_least_1(value: int) -> bool:
    return value >= 1


@dataclass(kw_only=True)
class LoraOptions(PlainFields):
    """Low-rank adapters by PEFT, under PEFT's names: weight + scaling B A, where only A and B are trained."""

    r: int | None = None
    """Rank of the adapters; null or 0: none, all weights are trained. The other options need it."""
    lora_alpha: int = 16
    """Numerator of scaling = lora_alpha / r."""
    lora_dropout: float = 0.0
    """Dropout on the input of A while training, in [0, 1)."""
    target_modules: list[str] | str = "all-linear"
    """Modules that get an adapter: all-linear (all but the head), a regular expression for whole names, or a list of
    names, which may hold lm_head, embed_tokens and all-linear."""
    modules_to_save: list[str] | None = None
    """Modules trained and saved in full beside the adapters, by name."""
    use_dora: bool = False
    """DoRA: the adapter turns the direction of each weight, a trained vector is its magnitude."""
    use_rslora: bool = False
    """Rank-stabilised: scaling = lora_alpha / sqrt(r)."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Biases that are also trained: none, all of the model, or only in the modules with an adapter."""
    init_lora_weights: bool | Literal["gaussian", "orthogonal"] = True
    """true: A uniform, B zero; gaussian: A normal, B zero; orthogonal: both, with A B = 0; false: both random."""
    quantize: Literal["4bit"] | None = None
    """4bit: QLoRA, the frozen weights as NF4 by bitsandbytes; with training.parallel ddp or one process."""

    def without_adapters(self) -> "LoraOptions":
        """Return the options for the base model under the adapters, which is stored without them."""
        return LoraOptions(quantize=self.quantize)


@dataclass(kw_only=True)
class ModelOptions(PlainFields):
    path: str = ""
    """Hugging Face hub id or directory of the base model to fine-tune."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype of the exported weights; auto: the dtype in the base model's config, or float32 if it names none;
    for adapters float32. Training keeps float32 weights."""
    lora: LoraOptions = field(default_factory=LoraOptions)
    """Train low-rank adapters instead of all weights."""
    attention: str | None = None
    """Attention implementation handed to transformers (sdpa, eager, flash_attention_2, flex_attention); null: its
    default. flex_attention trains on a GPU only."""


LENGTHS = "at least 2 (a prompt and a response token), or null"
"""What max_length may be, of the target's rows and of a reference's."""

_DATA = (
    ("eval_fraction", lambda v: 0 < v < 1, "in (0, 1), or null"),
    ("max_length", lambda v: v >= 2, LENGTHS),
    ("limit", at_least_1, "at least 1, or null"),
    ("num_proc", at_least_1, "at least 1, or null"),
)


_LISTS = ("train", "eval", "labels", "take")
"""Options for which a single value counts as a list of one, in YAML, on the command line and in Python."""


@dataclass(kw_only=True)
class DataOptions(PlainFields):
    train: list[str] | str = field(default_factory=list)
    """Training rows: files (.json .jsonl .parquet .arrow .csv .txt), directories or hub ids, whose subset and split
    may be named (NAME:SUBSET@SPLIT, NAME@train[:50%]; the split is train by default); several are concatenated."""
    eval: list[str] | str | None = None
    """Held-out rows from files of their own. Excludes data.eval_fraction."""
    eval_fraction: float | None = None
    """Share of the training rows to hold out, chosen by id and seed, in (0, 1). Excludes data.eval. For text with
    fewer than 2 / eval_fraction documents: the last part of each document."""
    seed: int | None = None
    """Seed by which data.take and data.eval_fraction choose rows; null: the run's seed."""
    format: Literal["auto", "alpaca", "messages", "sharegpt", "prompt_completion", "history", "text"] = "auto"
    """Format of the rows; auto recognises it from the fields of each row, plain text from each file's first usable one.
    text: documents without turns (.txt files, or rows with a field `text`), every token trained."""
    columns: dict[str, str | None] | None = None
    """Names of the fields in the rows, if they are not ours: {prompt: question, response: answer}. Ours are the
    fields of one format (response stands for completion), system, id, weight, tools and chat_template_kwargs. null:
    that field is not read. {id: null} is for ids that begin anew in each file: rows get ids made from their content."""
    packing: bool | None = None
    """Text only. true (what null means): documents one after the other fill windows of exactly max_length tokens.
    false: each example is a piece of one document."""
    template: str | None = None
    """null: the tokenizer's own chat template, or alpaca if it has none; alpaca; chatml; or a Jinja file."""
    template_options: dict[str, Any] | None = None
    """Values of the chat template's variables, as {enable_thinking: false}; the exported template has them as well."""
    thoughts: Thoughts = "train"
    """What an assistant thought before its answer (reasoning_content, reasoning or thinking of a turn, or <think> in
    its content). train: trained with the answer. mask: written, but not trained. drop: left out."""
    special_tokens: SpecialTokens = "text"
    """What the spelling of a special token in a row becomes (`<|im_end|>`, `</s>`). text: text, so that no row can end
    a turn or begin another. tokens: that token, for rows that you trust and that mean it."""
    max_length: int | None = None
    """Tokens per example; longer ones are cut at the end. null: the smaller of 2048 and the model's context."""
    multi_turn: Literal["per_turn", "whole"] = "per_turn"
    """per_turn: each assistant turn is an example with its history; whole: one example, all turns trained."""
    trained_turns: Literal["all", "last"] = "all"
    """Turns of the assistant that are trained, if their flags allow it; last: only the last one of a row."""
    roles: dict[str, str] | None = None
    """Names of roles in the rows, beside those that are known: {narrator: system, agent: assistant}. Ours are system,
    user, assistant, tool (a function's result) and function_call (a call in the content)."""
    label_field: str | None = None
    """Row field kept as the example's label (quality labels). Excludes data.labels."""
    labels: list[str] | str | None = None
    """One label for each entry of data.train, in their order, for all rows of its files. Excludes
    data.label_field."""
    skip_bad: bool = False
    """Drop and count bad rows instead of stopping with exit code 3."""
    take: list[int | float | None] | int | float | None = None
    """Rows used of each entry of data.train, in their order: [1000, 0.5, null] is 1,000 rows of the first, half of the
    second and all of the third. They are chosen by id and seed, before any are held out."""
    exclude: str | None = None
    """File of training rows to leave out, one in each line: an id or file:line, as `sftmix suspects` shows them."""
    limit: int | None = None
    """Use at most this many training rows, the first ones after the held-out split; for text, windows."""
    num_proc: int | None = None
    """Processes that tokenise conversations. null: on Linux one for each 10,000 of them, up to the number of cores;
    elsewhere 1."""
    cache_dir: str | None = None
    """Directory of the cache of tokenised rows. null: $SFTMIX_CACHE, or ~/.cache/sftmix."""

    def __setattr__(self, name: str, value: Any) -> None:
        """Make a list of a single name or number."""
        super().__setattr__(name, as_list(value) if name in _LISTS and value is not None else value)

    @property
    def drawn(self) -> bool:
        """True if a seed decides which rows are trained on."""
        return self.eval_fraction is not None or self.take is not None

    def problems(self) -> Iterator[str]:
        """Yield one sentence for each problem of these options, whatever the rest of a configuration."""
        train, held_out, labels, sizes = (getattr(self, name) for name in _LISTS)
        if not train:
            yield "data.train is missing: name the training rows, --data.train FILE (a file, directory or hub id)"
        for key, names in (("train", train), ("eval", held_out or [])):
            if any(not name.strip() for name in names):  # as a path it would be the working directory
                yield f"data.{key} has an empty name ({names}): name a file, directory or hub id (an unset variable?)"
        if held_out is not None and self.eval_fraction is not None:
            yield (
                f"data.eval ({', '.join(held_out)}) and data.eval_fraction ({self.eval_fraction}) exclude each other: "
                "held-out rows come from files of their own or from the training rows; set one to null"
            )
        if held_out == []:
            yield "data.eval is an empty list: name files of held-out rows, or null for none"
        if shared := sorted(set(train) & set(held_out or ())):
            yield f"data.train and data.eval both name {', '.join(shared)}: held-out rows must not be trained on"
        if labels is not None and self.label_field is not None:
            yield (
                f"data.labels ({', '.join(labels)}) and data.label_field ({self.label_field}) exclude each other: "
                "a label comes from the row's file or from a field of the row; set one to null"
            )
        for key, values in (("labels", labels), ("take", sizes)):
            if values is not None and len(values) != len(train):
                yield (
                    f"data.{key} has {len(values)} values {values} for {len(train)} entries of data.train {train}; "
                    "give one for each, in their order"
                )
        for size in sizes or ():
            share, number = isinstance(size, float), isinstance(size, int)
            if not (size is None or (share and 0 < size < 1) or (number and size >= 1)):
                yield (
                    f"data.take has {size}; allowed: a whole number of rows (1, 2, ...), a share below 1.0, or null. "
                    "No row is used twice, since ids are unique: for more weight, take fewer rows of the others"
                )
        for name, role in (self.roles or {}).items():
            if role not in ROLES.values():
                yield f"data.roles maps {name} to {role}; allowed: {', '.join(dict.fromkeys(ROLES.values()))}"
        yield from column_problems(self.format, self.columns or {})
        yield from out_of_range("data", self, _DATA)


DEFAULT_MICRO_BATCH = 8
"""Examples per forward and backward on one rank, if neither their number nor the number of their tokens is limited."""


LAYOUT = (
    "micro_batch_size",
    "micro_batch_tokens",
    "length_groups",
    "padding_free",
    "parallel",
    "shard_group_size",
    "activation_checkpointing",
    "compile",
    "chunk_size",
)
"""Training options that change the order of sums, and no result but for rounding; with dropout, also its masks."""


@dataclass(kw_only=True)
class TrainingOptions(PlainFields):
    global_batch_size: int = 32
    """Examples per optimizer step, over all ranks and accumulation steps; an even number when examples are paired."""
    micro_batch_size: int | None = None
    """Examples per forward and backward on one rank, at most; an even number when examples are paired. null: 8, or
    as many as training.micro_batch_tokens allows. Excludes it."""
    micro_batch_tokens: int | None = None
    """Token slots per forward and backward on one rank, at most, padding included: as many examples as fit. A pair, or
    an example, that needs more gets a micro-batch of its own. Excludes training.micro_batch_size."""
    learning_rate: float = 2e-6
    """Peak learning rate of AdamW."""
    weight_decay: float = 0.1
    """AdamW weight decay on matrices; biases and norms get none."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW betas."""
    eps: float = 1e-8
    """AdamW epsilon."""
    schedule: ScheduleName = "cosine"
    """Learning rate after the warm-up."""
    warmup_ratio: float = 0.1
    """Share of the steps with a linearly rising learning rate."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this global norm; 0 does not clip."""
    epochs: float = 3.0
    """Passes over the training rows."""
    max_steps: int | None = None
    """Stop after this many optimizer steps; the schedule has the same length. null: training.epochs decides."""
    precision: Precision = "auto"
    """bf16: autocast (FSDP: bf16 parameters in compute), weights and optimizer stay float32. auto: bf16 on a GPU
    that has it, else fp32."""
    parallel: Parallel = "auto"
    """Division of work between ranks under torchrun. fsdp: all ranks share one copy of the weights; hsdp: each group of
    shard_group_size ranks has one. auto: ddp on CPU, fsdp on several GPUs."""
    shard_group_size: int | None = None
    """hsdp only: ranks that share one copy of the weights, a divisor of their number. null: the ranks of a node."""
    activation_checkpointing: bool = False
    """Recompute each decoder layer in the backward: less memory, about a third more compute."""
    compile: bool = False
    """Compile each decoder layer (torch.compile): minutes at the start, fewer kernels after that; results differ in
    rounding. Needs a C++ compiler on a CPU, Triton on a GPU."""
    length_groups: int | None = None
    """Groups of similar length into which a micro-batch is padded; pairs stay random. null: one per two examples,
    at most 16, on CPU, one on a GPU. Excludes padding_free true."""
    padding_free: bool | Literal["auto"] = "auto"
    """true: the examples of a micro-batch share one row without padding, kept apart by their positions; a model that
    mixes them is refused. auto: true on a GPU with model.attention flash_attention_2, flash_attention_3 or
    flex_attention, which do no work between examples."""
    chunk_size: int | None = None
    """Token rows of logits alive at once in the loss; null: chosen from the vocabulary."""
    timeout: float = 1800.0
    """Seconds that ranks wait for one that hangs before the run ends, under torchrun. The first rank reads the rows and
    writes the model while the others wait, so it must be longer than that takes."""

    @property
    def most_examples(self) -> int | None:
        """Most examples of a micro-batch; None: only its tokens are limited."""
        if self.micro_batch_size is None and self.micro_batch_tokens is None:
            return DEFAULT_MICRO_BATCH
        return self.micro_batch_size


@dataclass(kw_only=True)
class CheckpointOptions(PlainFields):
    every: int | None = None
    """Optimizer steps between checkpoints; null: ten per stage, at least 50 steps apart. 0: none."""
    keep: int = 2
    """Number of checkpoints kept for each stage, at least 1."""
    keep_best: bool = False
    """Also keep the weights of the best held-out evaluation in training, for `export --best`."""
    rounding: Literal["stochastic", "nearest"] = "stochastic"
    """How float32 weights are rounded for an export in half precision (model.dtype). stochastic: to one of the two
    neighbours, by the seed, the nearer one more often, which keeps steps too small for nearest."""


@dataclass(kw_only=True)
class ReferenceModel(PlainFields):
    """Another reference model (section 5.1: a weaker one), with its own tokenizer, template and length."""

    path: str = ""
    """Hub id or directory; empty: the target's own base model."""
    template: str | None = None
    """As data.template, for the reference's tokenizer. null: the run's template if that is the target's tokenizer
    (padding aside); else the tokenizer's own, or alpaca if it has none."""
    max_length: int | None = None
    """As data.max_length, for the reference. null: the run's length, or the model's context if that is shorter, if it
    has the target's tokenizer; else the smaller of 2048 and the model's context."""
    lora: LoraOptions | None = None
    """Adapters of the reference. null: the target's (model.lora) if reference.model.path is empty, else none; r 0
    trains all weights."""


@dataclass(kw_only=True)
class ReferenceTraining(PlainFields):
    """Training options of the reference; null inherits the same option of `training`."""

    global_batch_size: int | None = None
    """Examples per optimizer step."""
    micro_batch_size: int | None = None
    """Examples per forward and backward on one rank. Replaces an inherited training.micro_batch_tokens."""
    micro_batch_tokens: int | None = None
    """Token slots per forward and backward on one rank. Replaces an inherited training.micro_batch_size."""
    learning_rate: float | None = None
    """Peak learning rate."""
    weight_decay: float | None = None
    """AdamW weight decay on matrices."""
    betas: tuple[float, float] | None = None
    """AdamW betas."""
    eps: float | None = None
    """AdamW epsilon."""
    schedule: ScheduleName | None = None
    """Learning rate after the warm-up."""
    warmup_ratio: float | None = None
    """Share of the steps with a linearly rising learning rate."""
    max_grad_norm: float | None = None
    """Gradients are clipped to this global norm."""
    epochs: float | None = None
    """Passes over the training rows. Replaces an inherited training.max_steps."""
    max_steps: int | None = None
    """Stop after this many optimizer steps; decides if epochs are also set."""
    precision: Precision | None = None
    """Precision of the computation."""
    parallel: Parallel | None = None
    """Division of work between ranks. Unless it is hsdp, replaces an inherited training.shard_group_size."""
    shard_group_size: int | None = None
    """hsdp only: ranks that share one copy of the weights."""
    activation_checkpointing: bool | None = None
    """Recompute each decoder layer in the backward."""
    compile: bool | None = None
    """Compile each decoder layer."""
    length_groups: int | None = None
    """Groups of similar length into which a micro-batch is padded. Replaces an inherited training.padding_free true."""
    padding_free: bool | Literal["auto"] | None = None
    """true: the examples of a micro-batch share one row without padding. Replaces an inherited
    training.length_groups."""
    chunk_size: int | None = None
    """Token rows of logits alive at once in the loss."""
    seed: int | None = None
    """Seed of the reference's order; null: the run's seed (with random streams of its own)."""


def reference_lora(target: ModelOptions, reference: object) -> LoraOptions:
    """Return the adapters of a reference model: its own, or the target's if both have the same base model, or none."""
    if not isinstance(reference, ReferenceModel):  # null: the target's base model
        return target.lora
    if reference.lora is not None:
        return reference.lora
    return LoraOptions() if reference.path else target.lora


def inherit(training: TrainingOptions, reference: ReferenceTraining | None) -> TrainingOptions:
    """Return the run's training options, replaced by those that the reference sets itself.

    If two options exclude each other and the reference sets one, the other is not inherited: a reference cannot
    put it aside itself, since its null inherits.
    """
    own = asdict(reference or ReferenceTraining())
    chosen = {name: value for name, value in own.items() if value is not None and name != "seed"}
    aside: dict[str, Any] = {}
    if "epochs" in chosen:
        aside["max_steps"] = None  # of both, max_steps decides
    if "micro_batch_size" in chosen:
        aside["micro_batch_tokens"] = None
    if "micro_batch_tokens" in chosen:
        aside["micro_batch_size"] = None
    if "length_groups" in chosen and training.padding_free is True:
        aside["padding_free"] = "auto"
    if chosen.get("padding_free") is True:
        aside["length_groups"] = None
    if chosen.get("parallel", "hsdp") != "hsdp":
        aside["shard_group_size"] = None
    return replace(training, **aside | chosen)
