"""Questions of rows or of a judge's tool, and their answers by one loaded model, in batches."""

import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

from sftmix.common.errors import DataError
from sftmix.common.rng import generator
from sftmix.data.formats import Columns, convert
from sftmix.data.sources import expand
from sftmix.data.store import content_hash
from sftmix.data.templates import TemplateRefusal
from sftmix.pipeline.loaded import LoadedModel
from sftmix.tools.answers.options import AnswerOptions
from sftmix.types import Example

OPTION = "--prompts"
FASTCHAT = {"extraction": 0.0, "math": 0.0, "coding": 0.0, "reasoning": 0.0, "stem": 0.1, "humanities": 0.1}
"""FastChat's temperatures by category (llm_judge/common.py); writing, roleplay and other categories get 0.7 there."""


@dataclass(frozen=True)
class Question:
    """A conversation that a model continues.

    id           the row's own id, or a hash of its content (`#k` for the k-th question of this id)
    messages     turns {role: ..., content: ...}, the last one of the user
    reference    the answer that the row has; None if it has none
    follow_ups   turns of the user that come after the model's own answers, one after the other
    temperature  of its answers, where the option does not say; 0 is greedy
    row          the row that it was read from; None: held-out rows of a run
    """

    id: str
    messages: tuple[dict[str, str], ...]
    reference: str | None = None
    follow_ups: tuple[str, ...] = ()
    temperature: float = 0.0
    row: Any = None

    def plain(self) -> dict[str, Any]:
        """Return what makes the question this one, in types that JSON can write."""
        more = {"follow_ups": list(self.follow_ups)} if self.follow_ups else {}
        return {"id": self.id, "messages": list(self.messages), "reference": self.reference, **more}


def question_of(example: Example) -> Question:
    """Make the question of a conversation: all turns before the last answer, which is the reference."""
    *before, last = example.messages
    messages = tuple({"role": turn.role, "content": turn.content} for turn in before)
    return Question(example.id or content_hash(example.messages), messages, last.content or None)


def read_questions(
    names: Sequence[str], columns: Mapping[str, str] | None = None, *, mt_bench: bool = False
) -> list[Question]:
    """Read the questions of files, directories and hub ids, in file order; answers may be missing.

    columns   data.columns of a run; a row without these fields keeps its own
    mt_bench  the rows are those of FastChat's question.jsonl, and of no format of training data
    Raises DataError that names the first bad row as `file:line: reason`.
    """
    reader, questions, times = Columns(columns), [], Counter[str]()
    for source in expand(names, OPTION):
        for place, row in source.rows():
            try:
                plain, later, temperature = reader.renamed(row), [], 0.0
                if mt_bench:
                    if not isinstance(plain["turns"], list) or not plain["turns"]:
                        raise ValueError("turns must be a list of texts")
                    first, *later = plain["turns"]
                    temperature = FASTCHAT.get(plain["category"], 0.7)
                    plain = {"id": plain["question_id"], "prompt": first}
                question = question_of(convert(_with_answer(plain), "auto", first=reader.formats))
            except (KeyError, ValueError) as problem:  # BadRow, or a question without turns
                reason = f"it has no {problem}" if isinstance(problem, KeyError) else problem
                raise DataError(f"{OPTION}: {place}: {reason}") from problem
            times[question.id] += 1
            name = question.id if times[question.id] == 1 else f"{question.id}#{times[question.id]}"
            follow_ups = tuple(later)
            questions.append(replace(question, id=name, row=row, follow_ups=follow_ups, temperature=temperature))
    if not questions:
        raise DataError(f"{OPTION}: {', '.join(names)}: there is no row; name a file with questions")
    return questions


def _with_answer(row: dict[str, Any]) -> dict[str, Any]:
    """Give a row that only asks an empty answer, so that the formats of training rows read it."""
    empty = {"role": "assistant", "content": ""}
    if "instruction" in row:
        return {"output": "", **row}
    if "prompt" in row:
        return {"completion": [empty] if isinstance(row["prompt"], list) else "", **row}
    for key in ("messages", "conversations"):
        match row.get(key):
            case [*turns, ({"role": "user" | "human"} | {"from": "user" | "human"}) as last]:
                return {**row, key: [*turns, last, empty]}
    return row


# ------------------------------------------------------------------------------------------------ answers


Key = tuple[str, str, int]
"""The name of a model, the id of a question, and the turn from 0."""
Answer = dict[str, Any]
"""key, and the columns below: the text (None if the prompt leaves no room in the model's context), how it
ended (stop, length, prompt_too_long), and numbers of tokens."""
COLUMNS = ("answers", "finish", "prompt_tokens", "answer_tokens")


def answered(
    loaded: LoadedModel, questions: Sequence[Question], answers: dict[Key, Answer], options: AnswerOptions
) -> Iterator[list[Answer]]:
    """Answer what is not among `answers`, add it there, and yield a batch at a time: first turns, then follow-ups.

    The batches are made of all questions, so that those that remain are answered in the batches that they had before.
    Prompts with equal room go through the model together: none sees how long others may be.
    """
    for turn in range(1 + max(len(question.follow_ups) for question in questions)):
        groups: dict[Any, list[Any]] = defaultdict(list)  # temperature and room -> keys with prompts
        for question in questions:
            if turn <= len(question.follow_ups):
                messages = list(question.messages)
                for past, follow_up in enumerate(question.follow_ups[:turn]):
                    answer = answers[loaded.name, question.id, past]["answers"] or ""
                    messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": follow_up}]
                prompt, room = asked(loaded, messages, options, question.id)
                groups[question.temperature, room].append(((loaded.name, question.id, turn), prompt))
        for (temperature, room), waiting in groups.items():
            waiting.sort(key=lambda one: -len(one[1]))
            for start in range(0, len(waiting), options.batch_size):
                some = waiting[start : start + options.batch_size]
                batch = {key: prompt for key, prompt in some if key not in answers}
                if not batch:
                    continue
                rows = generated(loaded, batch, room, temperature, options)
                for (key, prompt), ids in zip(batch.items(), rows, strict=True):
                    finish = "prompt_too_long" if not ids else "stop" if ids[-1] in loaded.stop_ids else "length"
                    answers[key] = {
                        "key": key,
                        "answers": loaded.text_of(ids) if ids else None,
                        "finish": finish,
                        "prompt_tokens": len(prompt),
                        "answer_tokens": len(ids),
                    }
                yield [answers[key] for key in batch]


def asked(
    loaded: LoadedModel, messages: Sequence[dict[str, str]], options: AnswerOptions, name: str
) -> tuple[list[int], int]:
    """Return the ids of a conversation that waits for an answer, and how many tokens this may have within the context.

    Raises DataError where the chat template refuses the conversation, with its name.
    """
    try:
        prompt = loaded.render(messages)
    except TemplateRefusal as error:
        raise DataError(f"prompt {name}: the chat template of {loaded.name} refuses it: {error}") from error
    return prompt, max(min(options.max_new_tokens, (loaded.context or sys.maxsize) - len(prompt)), 0)


@torch.inference_mode()
def generated(
    loaded: LoadedModel,
    prompts: Mapping[Key, list[int]],
    n: int,
    temperature: float,
    options: AnswerOptions,
    streamer: Any = None,
) -> list[list[int]]:
    """Return at most n ids after each prompt, through the first stop id.

    prompts   key, by whose id and turn tokens are drawn -> ids
    streamer  as transformers' generate takes it
    Shorter prompts are padded on the left; from the mask, transformers counts their positions from 0.
    """
    if not n:
        return [[] for _ in prompts]
    model: Any = loaded.model  # its type has no generate
    rows = [torch.tensor(prompt, device=model.device) for prompt in prompts.values()]
    pad, stop = loaded.encoder.pad_id, list(loaded.stop_ids)
    ids = pad_sequence(rows, True, pad, "left")
    longest, chain = ids.shape[1], LogitsProcessorList()
    if temperature:
        numbers = [generator(options.seed, "answer", name, turn).random(n) for _, name, turn in prompts]
        draws = torch.tensor(np.stack(numbers), device=model.device)  # f64[B, n] in [0, 1)

        def draw(so_far: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            """Leave one token of each row finite, which greedy decoding then takes; scores [B, V].

            The tokens' shares of [0, 1) stand in the order of the vocabulary; it is the one in whose share the row's
            number for this position falls.
            """
            place = so_far.shape[1] - longest
            shares = torch.softmax(scores.double(), dim=-1).cumsum(dim=-1)
            # A number equal to a border belongs to the next token: a token with share 0 is never drawn.
            chosen = torch.searchsorted(shares, draws[:, place : place + 1] * shares[:, -1:], right=True)
            chosen = chosen.clamp(max=scores.shape[1] - 1)
            return torch.full_like(scores, -torch.inf).scatter(1, chosen, 0.0)

        chain.append(TemperatureLogitsWarper(temperature))
        if options.top_p < 1:
            chain.append(TopPLogitsWarper(options.top_p))
        chain.append(draw)
    out = model.generate(
        input_ids=ids,
        attention_mask=pad_sequence([torch.ones_like(row) for row in rows], True, 0, "left"),
        generation_config=GenerationConfig(max_new_tokens=n, do_sample=False, eos_token_id=stop, pad_token_id=pad),
        logits_processor=chain,
        streamer=streamer,
    )
    answers = []
    for row in out[:, longest:].tolist():
        end = next((place for place, token in enumerate(row) if token in stop), n)
        answers.append(row[: end + 1])
    return answers
