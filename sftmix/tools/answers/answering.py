"""The answers of one loaded model to questions, in batches."""

import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

from sftmix.ranks.rng import generator
from sftmix.tools.answers.options import AnswerOptions, Question, Sampling
from sftmix.tools.runs.loaded import LoadedModel
from sftmix.tools.runs.models import Functions, Turns
from sftmix.words.errors import DataError, TemplateRefusal

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
    Prompts with equal room go through the model together: none sees how long others may be. If a batch would change
    their answers, they go through it one by one.
    """
    for turn in range(1 + max(len(question.follow_ups) for question in questions)):
        groups = defaultdict(list)  # temperature and room -> keys with prompts
        for question in questions:
            if turn <= len(question.follow_ups):
                messages = list(question.messages)
                for past, follow_up in enumerate(question.follow_ups[:turn]):
                    answer = answers[loaded.name, question.id, past]["answers"] or ""
                    messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": follow_up}]
                prompt, room = asked(loaded, messages, options, question.id, question.tools)
                groups[question.temperature, room].append(((loaded.name, question.id, turn), prompt))
        for (temperature, room), waiting in groups.items():
            waiting.sort(key=lambda one: -len(one[1]))  # longest first: little padding, and memory peaks at the start
            # The longest prompt with its answer: up to `together` a batch changes nothing.
            size = options.batch_size if len(waiting[0][1]) + room <= loaded.together else 1
            for start in range(0, len(waiting), size):
                batch = {key: prompt for key, prompt in waiting[start : start + size] if key not in answers}
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
    loaded: LoadedModel,
    messages: Turns,
    options: Sampling,
    name: str,
    tools: Functions = (),
) -> tuple[list[int], int]:
    """Return the ids of a conversation that waits for an answer, and how many tokens this may have within the context.

    Raises DataError, with the prompt's name, if the chat template refuses the conversation or writes no functions.
    """
    try:
        prompt = loaded.render(messages, tools)
    except TemplateRefusal as error:
        raise DataError(f"prompt {name}: the chat template of {loaded.name} refuses it: {error}") from error
    written = loaded.encoder.decode(prompt) if tools else ""  # a template without tools leaves them out without a word
    if not all(tool["function"]["name"] in written for tool in tools):
        raise DataError(f"prompt {name}: the chat template of {loaded.name} writes no functions; ask without tools")
    # A context of 2,048 and a prompt of 2,000 leave 48 tokens.
    return prompt, max(min(options.max_new_tokens, (loaded.context or sys.maxsize) - len(prompt)), 0)


@torch.inference_mode()
def generated(
    loaded: LoadedModel,
    prompts: Mapping[Key, list[int]],
    n: int,
    temperature: float,
    options: Sampling,
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
        draws = torch.tensor(np.stack(numbers), device=model.device)  # f64[B, n] in [0, 1), the same in any batch

        def draw(so_far: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            """Leave one token of each row finite, which greedy decoding then takes; scores [B, V].

            The tokens' shares of [0, 1) are in the order of the vocabulary; it is the one in whose share the row's
            number for this position falls.
            """
            place = so_far.shape[1] - longest  # 0 for the first new token
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
        answers.append(row[: end + 1])  # behind it is padding, until all rows have ended
    return answers
