"""One task on one model, by lm-eval."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM

from sftmix.evaluate.chosen import ChosenTask
from sftmix.evaluate.entries import Score
from sftmix.pipeline.loaded import LoadedModel


class Harness(HFLM):
    """A model as lm-eval asks it, with the tokenizer and the chat template of its training.

    Prompts that lose their beginning for being longer than the context are counted in `cut`.
    """

    def __init__(self, loaded: LoadedModel, batch_size: int) -> None:
        logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of each prompt that is cut; `cut` counts them
        tokenizer = loaded.encoder.tokenizer
        super().__init__(pretrained=loaded.model, tokenizer=tokenizer, batch_size=batch_size, max_length=loaded.context)
        self.cut = 0

    def _loglikelihood_tokens(self, requests: Sequence[Any], *args: Any, **more: Any) -> Any:
        limit = self.max_length + 1  # the last token is scored, not read
        self.cut += len({ask[0] for ask, context, answer in requests if len(context) + len(answer) > limit})
        return super()._loglikelihood_tokens(requests, *args, **more)


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
