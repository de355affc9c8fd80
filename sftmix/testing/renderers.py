"""The check of renderers: what is trained is behind the prompt that is served."""

import copy
import sys
from collections.abc import Sequence
from typing import Any

from sftmix.components.renderer import Renderer
from sftmix.text.mask import encode_examples
from sftmix.types import Example, RenderedTurn


def check_renderer(
    renderer: Renderer, tokenizer: Any, examples: Sequence[Example], *, thinks: bool | None = False
) -> None:
    """Check that each trained turn follows the prompt that is served, says the row once, and ends where it may end.

    Turns are those of `batch`, which training calls; `turns` gives the same. Added tokens that it writes are single
    ids; the turns of a conversation do not depend on others. Something is trained, unless the row's weights are 0.

    examples  conversations with a `trained` answer; answers have more than a letter, and spell no special token
    """
    used = copy.copy(renderer)
    used.begin(tokenizer, thinks=thinks)
    found = used.batch(examples)
    backwards = [used.batch([example])[0] for example in reversed(examples)]
    assert backwards[::-1] == found, "the turns of a conversation depend on those before it: keep no state"
    for example, turns in zip(examples, found, strict=True):
        assert used.turns(example) == turns, f"{example.id}: training calls `batch`, and `turns` returns something else"
        encode_examples(used, [example], sys.maxsize)  # as training does, which checks the number of turns, and weights
        trained = [place for place, message in enumerate(example.messages) if message.trained]
        for place, turn in zip(trained, turns, strict=True):
            _check_turn(used, turn, example, place)


def _check_turn(renderer: Renderer, turn: RenderedTurn, example: Example, place: int) -> None:
    """Check one rendered turn against the exported template, as transformers serves it, and the row."""
    tokenizer, before = renderer.tokenizer, example.messages[:place]
    where = f"{example.id}, turn {place}"
    served = Renderer.prompt(renderer, before, example.tools)  # of the base class: transformers' own, by `template`
    assert turn.prompt == served == renderer.prompt(before, example.tools), f"{where}: not the served prompt"
    answer = turn.ids[len(served) :]
    # by slices: an empty answer fails as well
    assert {*answer[-1:]} & {*renderer.ends}, f"{where}: its last id is none of {renderer.ends}"
    assert not set(answer[:-1]) & {*renderer.ends}, f"{where}: an id that ends a turn is inside it"
    message = example.messages[place]
    given = any(weight for _, weight in message.parts) if message.parts else message.weight
    assert any(weight for _, weight in turn.parts) or not given, f"{where}: all its weights are 0: nothing is trained"
    text, said = tokenizer.decode(answer), message.content.strip()
    assert text.count(said) == 1, f"{where}: {said!r} is not once in {text!r}"
    for number, token in tokenizer.added_tokens_decoder.items():
        # white space, which some tokenizers have among their added tokens, is in any text
        spelt = tokenizer.decode(turn.ids).count(token.content)
        assert turn.ids.count(number) >= spelt or not token.content.strip(), f"{where}: {token.content!r} is in pieces"
