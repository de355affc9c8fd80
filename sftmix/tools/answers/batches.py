"""Answers of one loaded model to questions, in batches of similar length."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

import torch
from transformers import GenerationConfig

from sftmix.common.errors import DataError
from sftmix.data.templates import TemplateRefusal
from sftmix.pipeline.loaded import LoadedModel
from sftmix.tools.answers.options import AnswerOptions
from sftmix.tools.answers.questions import Question
from sftmix.tools.answers.sampling import processors, uniforms

STOP, LENGTH, TOO_LONG = "stop", "length", "prompt_too_long"
"""How an answer ended: at a stop id, at the most tokens allowed, or before it began."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer; its text is None if the prompt leaves no room in the model's context."""

    text: str | None
    finish: str
    prompt_tokens: int
    answer_tokens: int


@dataclass(slots=True)
class _Asked:
    """A question under way: its prompt ids of this turn, and the answers so far."""

    question: Question
    prompt: list[int]
    answers: list[Answer]


def answered(
    loaded: LoadedModel, questions: Sequence[Question], done: Iterable[str], options: AnswerOptions
) -> Iterator[list[dict[str, Any]]]:
    """Answer the questions that are not done, and yield a batch at a time: {id, turns: [answer, ...]} of each question.

    The batches are made of all questions, so that those that remain are answered in the batches that they had before.
    """
    past = set(done)
    asked = [_Asked(question, _prompt(loaded, question, []), []) for question in questions]
    # Longest first: what does not fit into memory shows at once.
    asked.sort(key=lambda one: (options.at(one.question.temperature), -len(one.prompt)))
    for _, group in groupby(asked, key=lambda one: options.at(one.question.temperature)):
        same = list(group)
        for start in range(0, len(same), options.batch_size):
            batch = [one for one in same[start : start + options.batch_size] if one.question.id not in past]
            if batch:
                _converse(loaded, batch, options)
                yield [{"id": one.question.id, "turns": [asdict(answer) for answer in one.answers]} for one in batch]


def _converse(loaded: LoadedModel, batch: list[_Asked], options: AnswerOptions) -> None:
    """Answer the questions and their follow-ups, turn by turn, in place."""
    for turn in range(1 + max(len(one.question.follow_ups) for one in batch)):
        there = [one for one in batch if turn <= len(one.question.follow_ups)]
        for one in there:
            if turn:
                one.prompt = _prompt(loaded, one.question, one.answers)
        _one_turn(loaded, there, turn, options)


def _prompt(loaded: LoadedModel, question: Question, answers: Sequence[Answer]) -> list[int]:
    messages = list(question.messages)
    for answer, follow_up in zip(answers, question.follow_ups, strict=False):
        said = {"role": "assistant", "content": answer.text or ""}
        messages += [said, {"role": "user", "content": follow_up}]
    try:
        return loaded.render(messages)
    except TemplateRefusal as error:
        raise DataError(f"prompt {question.id}: the chat template of {loaded.name} refuses it: {error}") from error


def _one_turn(loaded: LoadedModel, batch: list[_Asked], turn: int, options: AnswerOptions) -> None:
    """Answer one turn. Prompts with equal room go through the model together: none sees how long others may be."""

    def room(one: _Asked) -> int:
        left = options.max_new_tokens if loaded.context is None else loaded.context - len(one.prompt)
        return max(min(options.max_new_tokens, left), 0)

    for n, group in groupby(sorted(batch, key=room), key=room):
        same = list(group)
        if n == 0:
            for one in same:
                one.answers.append(Answer(None, TOO_LONG, len(one.prompt), 0))
            continue
        temperature = options.at(same[0].question.temperature)
        keys = [(one.question.id, turn) for one in same]
        draws = uniforms(options.seed, keys, n) if temperature else None
        for one, ids in zip(
            same, _generate(loaded, [one.prompt for one in same], n, temperature, options.top_p, draws), strict=True
        ):
            finish = STOP if ids and ids[-1] in loaded.stop_ids else LENGTH
            one.answers.append(Answer(loaded.text_of(ids), finish, len(one.prompt), len(ids)))


@torch.inference_mode()
def _generate(
    loaded: LoadedModel, prompts: Sequence[list[int]], n: int, temperature: float, top_p: float, draws: Any
) -> list[list[int]]:
    """Return at most n ids after each prompt, through the first stop id.

    Shorter prompts are padded on the left; from the mask, transformers counts their positions from 0.
    """
    model: Any = loaded.model  # its type has no generate
    longest = max(map(len, prompts))
    pad = loaded.encoder.pad_id
    ids = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        generation_config=GenerationConfig(
            max_new_tokens=n, do_sample=False, eos_token_id=list(loaded.stop_ids), pad_token_id=pad
        ),
        logits_processor=processors(temperature, top_p, draws, longest),
    )
    return [_through_stop(row, loaded.stop_ids) for row in out[:, longest:].tolist()]


def _through_stop(ids: list[int], stop: Sequence[int]) -> list[int]:
    end = next((place for place, token in enumerate(ids) if token in stop), len(ids) - 1)
    return ids[: end + 1]
