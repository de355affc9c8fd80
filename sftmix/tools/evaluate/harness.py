"""One task on one model, by lm-eval."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from transformers import GenerationConfig

from sftmix.data.templates import TemplateRefusal
from sftmix.pipeline.loaded import LoadedModel
from sftmix.tools.evaluate.chosen import ChosenTask
from sftmix.tools.evaluate.entries import Score


class Harness(HFLM):
    """A model as lm-eval asks it, with the tokenizer, the chat template and the stop ids of its training.

    chat  prompts are rendered conversations: they become ids as in training, without another token before them
    cut   prompts that lost their beginning for being longer than the context
    """

    def __init__(self, loaded: LoadedModel, batch_size: int, *, chat: bool = False) -> None:
        logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of each prompt that is cut; `cut` counts them
        tokenizer = loaded.encoder.tokenizer
        super().__init__(pretrained=loaded.model, tokenizer=tokenizer, batch_size=batch_size, max_length=loaded.context)
        # Without these an answer would end at eos alone, which need not be what ends a turn.
        loaded.model.generation_config = GenerationConfig(
            eos_token_id=list(loaded.stop_ids), pad_token_id=self.tokenizer.pad_token_id
        )
        self.cut = 0
        self._encoder, self._chat = loaded.encoder, chat

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Render a conversation in the template of the training.

        add_generation_prompt  False: the last turn is the beginning of the answer, which the model continues
        A template that refuses a system turn gets the conversation without it.
        """
        turns = [{**turn, "content": self._encoder.content(turn["content"])} for turn in chat_history]
        begun = "" if add_generation_prompt else self._encoder.lead + turns.pop()["content"]
        try:
            return self._encoder.render([turns], prompt=True)[0] + begun
        except TemplateRefusal:
            others = [turn for turn in turns if turn["role"] != "system"]
            return self._encoder.render([others], prompt=True)[0] + begun

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, left_truncate_len: int | None = None, **more: Any
    ) -> list[int]:
        if not self._chat:
            return super().tok_encode(string, add_special_tokens, left_truncate_len, **more)
        ids = self._encoder.tokenize([string])[0]
        return ids[-left_truncate_len:] if left_truncate_len else ids

    def tok_batch_encode(
        self, strings: list[str], padding_side: str = "left", left_truncate_len: int | None = None, **more: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self._chat:
            return super().tok_batch_encode(strings, padding_side, left_truncate_len, **more)
        ids = self._encoder.tokenize(list(strings))
        rows = self.tokenizer.pad({"input_ids": ids}, padding_side=padding_side, return_tensors="pt")
        first = -left_truncate_len if left_truncate_len else None
        return rows["input_ids"][:, first:], rows["attention_mask"][:, first:]

    def _loglikelihood_tokens(self, requests: Sequence[Any], *args: Any, **more: Any) -> Any:
        limit = self.max_length + 1  # the last token is scored, not read
        self.cut += len({ask[0] for ask, context, answer in requests if len(context) + len(answer) > limit})
        return super()._loglikelihood_tokens(requests, *args, **more)

    def generate_until(self, requests: list[Any], *args: Any, **more: Any) -> list[str]:
        asked = {request.args[0]: request.args[1] for request in requests}
        self.cut += sum(len(self.tok_encode(prompt)) > self._room(options) for prompt, options in asked.items())
        return super().generate_until(requests, *args, **more)

    def _room(self, options: Mapping[str, Any]) -> int:
        """Return how many tokens of a prompt lm-eval keeps: those that the answer does not need."""
        return self.max_length - int(normalize_gen_kwargs(dict(options), self.max_gen_toks)["max_gen_toks"])


def measure(
    harness: Harness,
    task: ChosenTask,
    tasks: Any,
    *,
    num_fewshot: int | None,
    limit: int | None,
    seed: int,
    chat: bool,
) -> dict[str, Any]:
    """Measure a task and return the fields of an Entry that come out: scores, all, cut, seconds, finished.

    tasks  lm-eval's TaskManager
    seed   of the few-shot examples and of all else that is drawn
    """
    harness.cut, start = 0, time.monotonic()
    found = simple_evaluate(
        model=harness,
        tasks=[task.spec],
        task_manager=tasks,
        num_fewshot=num_fewshot,
        limit=limit,
        apply_chat_template=chat,
        random_seed=seed,
        numpy_random_seed=seed,
        torch_random_seed=seed,
        fewshot_random_seed=seed,
    )
    return {
        "scores": scores_of(task.name, found),
        "all": {name: _plain(values) for name, values in found["results"].items()},
        "cut": harness.cut,
        "seconds": time.monotonic() - start,
        "finished": time.time(),
    }


def scores_of(name: str, found: Mapping[str, Any]) -> dict[str, Score]:
    """Return the scores of what was asked for: of the group where it has a metric of its own, else of each task."""
    results, samples = found["results"], found.get("samples", {})
    scores = {task: score for task in results if (score := _score(results[task], samples.get(task, [])))}
    return {name: scores[name]} if name in scores else scores


def _score(values: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> Score | None:
    """Return the first metric of a task, as its file lists them; None if it has none."""
    keys = [key for key, value in values.items() if "," in key and "_stderr" not in key and isinstance(value, float)]
    if not keys:
        return None
    metric, kind = keys[0].split(",", 1)
    stderr = values.get(f"{metric}_stderr,{kind}")
    own = sorted((s for s in samples if s.get("filter", kind) == kind), key=lambda sample: int(sample["doc_id"]))
    each = [sample.get(metric) for sample in own]
    known = bool(each) and all(isinstance(value, int | float) for value in each)
    return Score(
        metric=metric,
        value=float(values[keys[0]]),
        stderr=float(stderr) if isinstance(stderr, int | float) else None,
        n=int(values.get("sample_len", len(own)) or len(own)),
        questions=[str(sample["doc_hash"]) for sample in own] if known else [],
        values=[float(value) for value in each if value is not None] if known else [],
    )


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if isinstance(value, str | int | float)}
