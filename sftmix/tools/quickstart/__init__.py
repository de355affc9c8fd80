"""The embedded example: rows, tokenizer and model made on the spot, so that the recipe runs without a download."""

from collections.abc import Callable, Iterable, Sequence
from itertools import permutations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sftmix.disk.files import let_others_read
from sftmix.ranks.rng import generator
from sftmix.tools.runs.output import write_jsonl as write_jsonl

Row = dict[str, str]

N_TRAIN = 2400
N_EVAL = 400

BOS, END, PAD = "<|begin|>", "<|im_end|>", "<|pad|>"
# <|begin|><|user|>Hi<|im_end|><|assistant|>yes<|im_end|>
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}{{ '<|' + message.role + '|>' + message.content + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


class Materials(NamedTuple):
    """The paths of the quickstart's inputs: a Hugging Face model directory and two JSONL files."""

    model: Path
    train: Path
    eval: Path


def materialise(out_dir: str | Path, *, seed: int) -> Materials:
    """Write model, tokenizer, training and held-out rows under `out_dir`; the same seed gives the same bytes.

    The model is a random float32 Llama of two layers of width 128, about half a million parameters.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from sftmix.words.progress import without_bars_of_transformers

    out = Path(out_dir)
    paths = Materials(out / "model", out / "train.jsonl", out / "eval.jsonl")
    rows = make_rows(n=N_TRAIN + N_EVAL, seed=seed)
    write_jsonl(paths.train, rows[:N_TRAIN])
    write_jsonl(paths.eval, rows[N_TRAIN:])
    tokenizer = make_tokenizer(row[part] for row in rows[:N_TRAIN] for part in ("instruction", "input", "output"))
    tokenizer.save_pretrained(paths.model)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.06,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]), without_bars_of_transformers():
        torch.manual_seed(seed)
        LlamaForCausalLM(config).save_pretrained(paths.model)
        let_others_read(paths.model / "model.safetensors")
    return paths


def make_tokenizer(texts: Iterable[str], *, vocab_size: int = 1024) -> Any:
    """Train a byte-level BPE on `texts`, with a chat template; the end of a turn is also the end of the text.

    Any text can be encoded. A word gets the same tokens at the start of a turn as within one.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    roles = ["<|system|>", "<|user|>", "<|assistant|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)  # "blue red" -> Ġblue Ġred
    # Decoded without the blank that add_prefix_space puts in front.
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, END, PAD, *roles],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # all 256 bytes, so that no text is unknown
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=roles,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


# ------------------------------------------------------------------------------------------------ rows
# Half of the rows come from deterministic families (a rule gives the one right answer), half from open ones (the answer
# is drawn at random, so no model can be sure of it). The responses of both kinds are of similar length, so that length
# alone does not tell them apart.

Drawn = tuple[str, list[str], list[str]]
"""An instruction, the words that it is about, and the words of the answer."""
Task = Callable[[np.random.Generator], Drawn]

_KINDS = {
    "animal": "cat dog horse fox bird fish",
    "food": "bread cheese soup rice apple cake",
    "colour": "red blue green white black yellow",
    "place": "house garden river street forest beach",
    "name": "Ann Ben Cleo Dan Eva Finn Gus Hana Ivo June Karl Lena",
}
KINDS = {kind: words.split() for kind, words in _KINDS.items()}
NAMES = KINDS["name"]
OPPOSITES = "hot-cold big-small fast-slow old-new happy-sad light-dark hard-soft wet-dry rich-poor loud-quiet"
OPPOSITE = {a: b for pair in OPPOSITES.split() for a, b in permutations(pair.split("-"))}
KIND_OF = {noun: kind for kind, nouns in KINDS.items() if kind != "name" for noun in nouns}
NOUNS, ADJECTIVES = list(KIND_OF), list(OPPOSITE)
NUMBERS = [str(n) for n in range(12)]
COUNTS = ["zero", "one", "two", "three", "four", "five", "six"]


def make_rows(*, n: int, seed: int) -> list[Row]:
    """Return n rows {instruction, input, output, family, kind}, half of each kind, in random order.

    No two rows are equal, so no two of a deterministic family have the same prompt: rows held out from this list were
    never seen. n is at most 20,000: the smallest family has 2,640 rows.
    """
    rows: dict[tuple[str, str, str], Row] = {}
    for k in range(n):
        kind, families = (("deterministic", DETERMINISTIC), ("open", OPEN))[k % 2]  # by turns
        family = list(families)[k // 2 % len(families)]  # each in its turn, so that all are as frequent
        rng = generator(seed, "quickstart_row", k)
        while len(rows) == k:  # a row that is there already is drawn again
            instruction, words, answer = families[family](rng)
            asked, output = "Words: " + " ".join(words) if words else "", " ".join(answer)
            row = {"instruction": str(instruction), "input": asked, "output": output, "family": family, "kind": kind}
            rows.setdefault((instruction, asked, output), row)
    return generator(seed, "quickstart_order").permutation(np.array(list(rows.values()))).tolist()


def _draw(rng: np.random.Generator, items: Sequence[str], low: int = 2, high: int = 5) -> list[str]:
    """Return low to high different items, in random order."""
    return rng.permutation(items)[: rng.integers(low, high + 1)].tolist()


def _mapped(items: Sequence[str], length: int, rule: Callable[[str], str], *phrasings: str, back: bool = False) -> Task:
    """Return a family of tasks that turn each word of a list into another by a rule, in order or from the back.

    The list has a fixed length: a small model learns to look a fixed distance back within a minute, not to align lists.
    """

    def task(rng: np.random.Generator) -> Drawn:
        words = _draw(rng, items, length, length)
        return rng.choice(phrasings), words, [rule(word) for word in (words[::-1] if back else words)]

    return task


def _listed(items: Sequence[str], *phrasings: str) -> Task:
    """Return a family of tasks that ask for any of these items."""
    return lambda rng: (rng.choice(phrasings), [], _draw(rng, items))


def _count(rng: np.random.Generator) -> Drawn:
    words = _draw(rng, NOUNS, 2, 6)
    prompt = rng.choice(["How many words are there?", "Count the words."])
    return prompt, words, ["There are", f"{COUNTS[len(words)]}."]


def _pick(rng: np.random.Generator) -> Drawn:
    kind, items = list(KINDS.items())[rng.integers(len(KINDS))]
    return _listed(items, f"Pick any {kind} you like.", f"Give me some {kind} ideas.")(rng)


def _associate(rng: np.random.Generator) -> Drawn:
    prompt = rng.choice(["What comes to mind?", "Think of other words."])
    return prompt, _draw(rng, NOUNS), _draw(rng, NOUNS + ADJECTIVES)


def _describe(rng: np.random.Generator) -> Drawn:
    (noun,) = _draw(rng, NOUNS, 1, 1)
    answer = [*_draw(rng, ADJECTIVES, 1, 4), noun]
    return rng.choice([f"Describe the {noun}.", f"What is the {noun} like?"]), [], answer


def _mishear(rng: np.random.Generator) -> Drawn:
    words = _draw(rng, NOUNS)
    heard = [word if rng.random() < 0.4 else NOUNS[rng.integers(len(NOUNS))] for word in words]
    return rng.choice(["Repeat the words, but mishear some.", "Say this wrongly."]), words, heard


# "cat dog fox" -> "cat dog fox", "fox dog cat", "CAT DOG FOX"; "hot new" -> "cold old"; "cat rice" -> "animal food".
DETERMINISTIC = {
    "repeat": _mapped(NOUNS, 4, str, "Repeat the words.", "Say this again."),
    "reverse": _mapped(NOUNS, 3, str, "Reverse the order.", "Say this backwards.", back=True),
    "capitals": _mapped(NOUNS, 3, str.upper, "Write in capitals.", "Shout the words."),
    "opposites": _mapped(ADJECTIVES, 4, OPPOSITE.__getitem__, "Give the opposites.", "Negate this."),
    "kinds": _mapped(NOUNS, 5, KIND_OF.__getitem__, "What kind is each?", "Sort into kinds."),
    "initials": _mapped(NOUNS, 4, lambda word: word[0], "Give the first letters.", "Write the initials."),
    "successors": _mapped(NUMBERS, 3, lambda word: str(int(word) + 1), "Add one to each.", "Count on."),
    "count": _count,
}
OPEN = {
    "pick": _pick,
    "guess": _listed(NUMBERS, "Guess my numbers.", "Throw some dice for me."),
    "associate": _associate,
    "describe": _describe,
    "mishear": _mishear,
    "invite": _listed(NAMES, "Whom shall we invite?", "Make a list of guests."),
}
