"""Tasks for lm-eval, and a finished model as lm-eval asks it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from transformers import GenerationConfig

from sftmix.data.templates import TemplateRefusal
from sftmix.pipeline.loaded import LoadedModel


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

    def tok_encode(self, string: str, *args: Any, **more: Any) -> list[int]:
        return self._encoder.tokenize([string])[0] if self._chat else super().tok_encode(string, *args, **more)

    def tok_batch_encode(
        self, strings: list[str], padding_side: str = "left", left_truncate_len: int | None = None, **more: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        prompts = [self.tok_encode(string) for string in strings]
        if left_truncate_len:
            self.cut += sum(len(ids) > left_truncate_len for ids in prompts)
            prompts = [ids[-left_truncate_len:] for ids in prompts]
        rows = self.tokenizer.pad({"input_ids": prompts}, padding_side=padding_side, return_tensors="pt")
        return rows["input_ids"], rows["attention_mask"]

    def _loglikelihood_tokens(self, requests: Sequence[Any], *args: Any, **more: Any) -> Any:
        limit = self.max_length + 1  # the last token is scored, not read
        self.cut += len({ask[0] for ask, context, answer in requests if len(context) + len(answer) > limit})
        return super()._loglikelihood_tokens(requests, *args, **more)


def scores_of(name: str, found: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the scores of what was asked for: of a group where it has a metric of its own, else of each of its tasks.

    found  the results of lm-eval's simple_evaluate
    A score is the first metric of a task, as its file lists them: metric, value, stderr (None where lm-eval gives
    none), n, and `questions` (the hash of each) with `values` (the metric of each), empty for a group.
    """
    scores = {}
    for task, results in found["results"].items():
        metrics = [key for key in results if "," in key and "_stderr" not in key]
        keys = [key for key in metrics if isinstance(results[key], float)]
        if not keys:
            continue
        metric, kind = keys[0].split(",", 1)
        stderr = results.get(f"{metric}_stderr,{kind}")
        samples = [one for one in found.get("samples", {}).get(task, []) if one.get("filter", kind) == kind]
        samples.sort(key=lambda sample: int(sample["doc_id"]))
        values = [sample.get(metric) for sample in samples]
        known = all(isinstance(value, int | float) for value in values)
        scores[task] = {
            "metric": metric if kind == "none" else f"{metric} ({kind})",
            "value": results[keys[0]],
            "stderr": stderr if isinstance(stderr, float) else None,
            "n": int(results.get("sample_len", 0)) or len(samples),
            "questions": [sample["doc_hash"] for sample in samples] if known else [],
            "values": list(map(float, values)) if known else [],
        }
    return {name: scores[name]} if name in scores else scores
