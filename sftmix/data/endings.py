"""The end of a turn, as a chat template writes it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING

from sftmix.common.errors import ConfigError
from sftmix.data.rendering import ANSWER, ARGUMENT, Renderer, View, before, common_start
from sftmix.data.trial import AND_NOW, PROBE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def ends_of(
    renderer: Renderer,
    source: str,
    view: View,
    within: str,
    call: str,
    notices: list[str],
) -> tuple[str, str, str]:
    """Return the text from an answer through the end of its turn, the token there, and the token behind a call.

    What ends a turn does not occur inside one: not between the prompt and the answer, nor in a call. eos is taken
    before any other token, if the template writes it behind every answer, and put there if it writes none.

    within  what is in front of an answer
    call    what the template writes from a call on
    """
    tokenizer = renderer.tokenizer
    after = view.plain.rpartition(ANSWER)[2]
    between = after
    with suppress(ConfigError):  # in the middle of a conversation
        between = renderer([*PROBE, AND_NOW], source=source).rpartition(ANSWER)[2].rpartition(AND_NOW["content"])[0]
    *begun, ended = call.rpartition(ARGUMENT)
    calls = list(_marks(tokenizer, ended))
    inside = set(_marks(tokenizer, within + begun[0]))
    always = common_start(after, between)
    eos = tokenizer.eos_token
    ends = [mark for mark in _marks(tokenizer, after) if mark not in inside]
    ends = [eos] if eos in ends and eos in _marks(tokenizer, always) else ends
    if ends:
        ending = _through(after, ends[0])
    elif between != after:
        header = common_start(between[::-1], before(view.asked, PROBE[0]["content"])[::-1])[::-1]  # of a next turn
        ends = [mark for mark in _marks(tokenizer, between.removesuffix(header)) if mark not in inside]
        if ends:
            ending = _through(between, ends[0])
            notices.append(f"The template writes {ends[0]!r} only before a next turn: it is put after every response.")
    if not ends:
        if eos is None:
            raise ConfigError(
                "data.template: the template writes no end-of-turn token after a response, and the tokenizer has no "
                "eos token: a model trained so would never stop. Choose another data.template or set an eos token."
            )
        notices.append(f"The template writes no end-of-turn token: {eos!r} is put after responses.")
        ends = [eos]
        ending = eos
    special = {str(tokenizer.convert_ids_to_tokens(number)) for number in tokenizer.all_special_ids}
    special |= {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    last = calls[-1] if calls and ends[0] not in calls and calls[-1] in special - inside else ends[0]
    return ending, ends[0], last


def _marks(tokenizer: PreTrainedTokenizerBase, text: str) -> Iterator[str]:
    """Yield the special and the added tokens of a text, but for white space, which some tokenizers add for any text."""
    added = tokenizer.added_tokens_decoder
    for number in tokenizer(text, add_special_tokens=False)["input_ids"]:
        spelling = str(tokenizer.convert_ids_to_tokens(number))
        if number in tokenizer.all_special_ids or (number in added and spelling.strip()):
            yield spelling


def _through(text: str, mark: str) -> str:
    return text[: text.index(mark) + len(mark)]
