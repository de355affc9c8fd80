"""SFTMix (arXiv 2410.05248) on one page: from rows to a model, in float32 on one process, with torch and transformers.

    python docs/examples/one_file.py --model gpt2 --rows rows.jsonl --out trained

A row is a line of JSON with `instruction`, `output` and perhaps `input`. Every field of `Settings` is an option. This
is the method alone, to be read from top to bottom. `sftmix run` gives the same losses, split and weights if both draw
the same orders, pairs and lambdas. It also has what is missing here: held-out rows, resume, several GPUs, bf16, LoRA,
packing, chats of several turns, and models that scale or cap their logits.
"""

import argparse
import json
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer


@dataclass
class Settings:
    """The paper's settings for Alpaca-52K."""

    learning_rate: float = 2e-6
    weight_decay: float = 0.1
    eps: float = 1e-8  # of AdamW
    warmup_ratio: float = 0.1
    epochs: int = 3
    batch_size: int = 32  # rows of a step
    micro_batch_size: int = 8  # rows of a forward pass
    max_length: int = 2048  # tokens of a row
    checkpoints: int = 5  # of the reference
    mu: float = 0.2  # weight of Mixup
    alpha: float = 0.5  # lambda ~ Beta(alpha, alpha)
    seed: int = 42


# 1. Rows become tokens.
TEMPLATE = (  # for a model without a chat template
    "{% for m in messages %}{% if m.role == 'user' %}{{ '### Instruction:\\n' + m.content + '\\n\\n' }}"
    "{% else %}{{ '### Response:\\n' + m.content + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}"
)


class Row(NamedTuple):
    ids: list[int]  # of the instruction and its response, which ends with the end of turn
    start: int  # of the response
    n: int  # tokens of the response: N


def read_rows(path: str, tokenizer: Any, max_length: int) -> list[Row]:
    """Read the rows; a response is cut at the maximum length, and a row without any room for it is left out."""
    tokenizer.chat_template = tokenizer.chat_template or TEMPLATE
    rows = []
    for line in Path(path).read_bytes().splitlines():  # of text, U+2028 would end a line, too
        row = json.loads(line)
        turn = {"role": "user", "content": "\n".join(filter(None, [row["instruction"], row.get("input")]))}
        prompt = tokenizer.apply_chat_template([turn], add_generation_prompt=True, return_dict=False)
        response = tokenizer(row["output"], add_special_tokens=False).input_ids
        ids = [*prompt, *response, tokenizer.eos_token_id][:max_length]
        rows.append(Row(ids, len(prompt), len(ids) - len(prompt)))
    return [row for row in rows if row.n > 0]


# 2. The two losses.
def states(model: Any, rows: Sequence[Row]) -> list[tuple[Tensor, Tensor]]:
    """Return Z [N, D] and Y [N] of each row: the inputs of the LM head that predict the response, and its tokens."""
    ids = pad_sequence([torch.tensor(row.ids) for row in rows], batch_first=True).to(model.device)
    mask = pad_sequence([torch.ones(len(row.ids)) for row in rows], batch_first=True).to(model.device)
    hidden = model.base_model(input_ids=ids, attention_mask=mask).last_hidden_state
    # the state of one token predicts the next
    spans = [torch.arange(row.start, row.start + row.n, device=model.device) for row in rows]
    return [(hidden[k, span - 1], ids[k, span]) for k, span in enumerate(spans)]


def nll(model: Any, Z: Tensor, Y: Tensor) -> Tensor:
    """Return the sum of -log softmax(W Z)[Y] over tokens."""
    return F.cross_entropy(model.get_output_embeddings()(Z), Y, reduction="sum")


def mixup(model: Any, confident: tuple[Tensor, Tensor], unconfident: tuple[Tensor, Tensor], lam: float) -> Tensor:
    """Return the sum of the cross entropies between mixed labels and softmax(W Z~), n-th token with n-th token."""
    (Z_c, Y_c), (Z_u, Y_u) = confident, unconfident
    n = min(len(Y_c), len(Y_u))
    Z = lam * Z_c[:n] + (1 - lam) * Z_u[:n]
    return lam * nll(model, Z, Y_c[:n]) + (1 - lam) * nll(model, Z, Y_u[:n])


# 3. Training, by NTP alone or with pairs.
Unit = tuple[int, ...]  # a row that is trained alone, or a pair: confident, unconfident


def batches(units: Sequence[Unit], size: int) -> Iterator[list[Unit]]:
    """Cut units, in their order, into batches of at most so many rows."""
    batch: list[Unit] = []
    for unit in units:
        if batch and sum(map(len, batch)) + len(unit) > size:
            yield batch
            batch = []
        batch.append(unit)
    yield batch


def train(
    model: Any, rows: Sequence[Row], steps: Sequence[Sequence[Unit]], settings: Settings, draw: Callable[..., float]
) -> Iterator[tuple[float, ...]]:
    """Train on the batch of each step, and yield (NTP, Mixup); `draw(step, i, j)` is the lambda of a pair."""
    weights = list(model.parameters())
    matrices = {"params": [w for w in weights if w.ndim >= 2], "weight_decay": settings.weight_decay}
    vectors = {"params": [w for w in weights if w.ndim < 2], "weight_decay": 0.0}
    optimizer = torch.optim.AdamW([matrices, vectors], eps=settings.eps)
    warmup = math.ceil(settings.warmup_ratio * len(steps))
    for step, batch in enumerate(steps):
        model.train()
        # Both counts are of the whole batch: a mean of the micro-batches' means would weigh tokens of short ones more.
        n_ntp = sum(rows[k].n for unit in batch for k in unit)
        n_mixup = max(1, sum(min(rows[k].n for k in unit) for unit in batch if len(unit) == 2))
        losses = torch.zeros(2)
        for part in batches(batch, settings.micro_batch_size):
            numbers = [k for unit in part for k in unit]
            of = dict(zip(numbers, states(model, [rows[k] for k in numbers]), strict=True))
            pairs = [(of[unit[0]], of[unit[1]], draw(step, *unit)) for unit in part if len(unit) == 2]
            ntp = sum(nll(model, *of[k]) for k in numbers) / n_ntp
            mixed = sum((mixup(model, *pair) for pair in pairs), ntp * 0) / n_mixup
            (ntp + settings.mu * mixed).backward()
            losses += torch.stack([ntp, mixed]).detach().cpu()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        cosine = (1 + math.cos(math.pi * (step - warmup) / max(1, len(steps) - warmup))) / 2
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * ((step + 1) / warmup if step < warmup else cosine)
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step + 1} of {len(steps)}: NTP {losses[0]:.4f}, Mixup {losses[1]:.4f}")
        yield tuple(losses.tolist())


# 4. The reference: how well it knows each row, at some checkpoints of its training.
def confidences(model: Any, rows: Sequence[Row], steps: Sequence[Sequence[Unit]], settings: Settings) -> Tensor:
    """Train by NTP; return Conf f64[rows], minus the perplexity exp(NLL / N), averaged over the checkpoints."""
    places = {max(1, round(len(steps) * (c + 1) / settings.checkpoints)) for c in range(settings.checkpoints)}
    size = settings.micro_batch_size
    parts = [rows[start : start + size] for start in range(0, len(rows), size)]
    scored = []
    for done, _ in enumerate(train(model, rows, steps, settings, draw=lambda *pair: 1.0), start=1):
        if done in places:
            model.eval()
            with torch.no_grad():
                found = [nll(model, Z, Y).double() / len(Y) for part in parts for Z, Y in states(model, part)]
            scored.append(torch.stack(found).exp())
    return -torch.stack(scored).mean(0)


def split(confidence: Tensor) -> tuple[list[int], list[int]]:
    """Return the rows of the confident and the unconfident half; of an odd number the median row is in neither."""
    ranked = confidence.argsort(descending=True, stable=True).tolist()
    return ranked[: len(ranked) // 2], ranked[(len(ranked) + 1) // 2 :]


# 5. The whole recipe.
def main() -> None:
    parser = argparse.ArgumentParser(description="SFTMix (arXiv 2410.05248): from rows to a model.")
    for name in ("model", "rows", "out"):
        parser.add_argument(f"--{name}", required=True)
    for field in fields(Settings):
        parser.add_argument(f"--{field.name}", type=type(field.default), default=field.default)
    options = vars(parser.parse_args())
    path, file, out = (options.pop(name) for name in ("model", "rows", "out"))
    settings = Settings(**options)
    rng = random.Random(settings.seed)
    torch.manual_seed(settings.seed)  # of dropout, if the model has any
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(path)
    rows = read_rows(file, tokenizer, settings.max_length)

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).to(device)
    orders = [rng.sample(range(len(rows)), len(rows)) for _ in range(settings.epochs)]
    steps = [batch for order in orders for batch in batches([(k,) for k in order], settings.batch_size)]
    confident, unconfident = split(confidences(model, rows, steps, settings))

    median = [(k,) for k in {*range(len(rows))} - {*confident, *unconfident}]
    steps = []
    for _ in range(settings.epochs):  # a random matching of both halves, new in every epoch
        halves = (rng.sample(half, len(half)) for half in (confident, unconfident))
        steps += batches([*zip(*halves, strict=True), *median], settings.batch_size)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).to(device)
    list(train(model, rows, steps, settings, draw=lambda *pair: rng.betavariate(settings.alpha, settings.alpha)))
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    main()
