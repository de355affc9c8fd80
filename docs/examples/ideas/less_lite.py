"""LESS (arXiv 2402.04333), lite: rows whose gradients are like a target's; `--selector less_lite.LESSLite`."""

from functools import cache
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sftmix.components import Need, Selector
from sftmix.components.component import require
from sftmix.types import Float32, Rows, Scores


class LESSLite(Selector):
    """The rows whose gradient points most where that of the rows about a topic points, by the cosine with their mean;
    left out: adapters, Adam's moments, several checkpoints, and a target set of its own."""

    needs = frozenset({Need.TEXTS})

    def __init__(self, *, model: str, about: str, share: float = 0.5):
        """
        model: name or directory of the model whose gradients count.
        about: the target is the rows with these words in the question.
        share: of the rows that are kept.
        """
        self.model, self.about, self.share = model, about, share

    def select(self, scores: Scores, *, seed: int) -> Rows:
        gradients = np.stack([gradient(self.model, *scores.texts[row]) for row in range(len(scores))])
        target = np.array([self.about in question for question, _ in scores.texts])
        require(target.any(), "selector.about", self.about, "words that some question has")
        near = gradients @ gradients[target].mean(0)
        ranked = sorted(range(len(near)), key=lambda row: (-near[row].round(6), scores.id[row]))
        return np.array(ranked[: round(self.share * len(near))])


@cache
def gradient(model: str, question: str, answer: str) -> Float32:
    """Return f32[D]: the gradient of the answer's NLL by the inputs of the head, summed over tokens, of length 1."""
    tokenizer, network = loaded(model)
    asked = tokenizer(question + "\n").input_ids
    answered = tokenizer(answer, add_special_tokens=False).input_ids
    labels = torch.tensor([[-100] * len(asked) + answered])
    out = network(input_ids=torch.tensor([asked + answered]), labels=labels, output_hidden_states=True)
    (found,) = torch.autograd.grad(out.loss, out.hidden_states[-1])
    return torch.nn.functional.normalize(found.sum((0, 1)), dim=0).numpy()


@cache
def loaded(model: str) -> tuple[Any, Any]:
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    return AutoTokenizer.from_pretrained(model), network.eval()
