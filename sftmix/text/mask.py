"""The mask of an example's response tokens, from token ids as the renderer gives them.

The ids in front of a trained turn are those that generation starts from, and the ids of the turn are the response.
"""

from collections.abc import Iterator, Sequence
from numbers import Integral
from typing import Any

from sftmix.components.renderer import Renderer
from sftmix.text.chat_template import ChatTemplate
from sftmix.text.examples import EncodedRow, examples_of
from sftmix.text.turns import MOST_WEIGHT
from sftmix.types import Example, RenderedTurn
from sftmix.words.errors import ContractError, DataError, TemplateRefusal, TokenizerFailure
from sftmix.words.shown import quoted, shortened

LOST = ("template_refused", "tools_lost", "calls_lost", "prefix_mismatch")
"""Reasons why a turn cannot be trained under a template."""
APART = {"composed", "boundary"}
"""Reasons why a turn cannot be one of several in an example: the next one's prompt has it in other tokens."""

SPLIT = "split_turns"
"""The only reason of a conversation that cannot be masked as a whole: each of its turns is an example."""


def encode_each(
    renderer: Renderer, examples: Sequence[Example], max_length: int, *, splits: bool = True
) -> Iterator[tuple[Example, EncodedRow]]:
    """Tokenise examples, as `encode_examples`, and yield each; one that must be split is followed by its turns.

    splits  False: its turns are left out, and its reason is split_alone
    """
    for example, found in zip(examples, encode_examples(renderer, examples, max_length), strict=True):
        if found.reasons != [SPLIT]:
            yield example, found
        elif splits:
            yield example, found
            yield from encode_each(renderer, [*examples_of(example, whole=False)], max_length)
        else:
            yield example, EncodedRow(["split_alone"])


def encode_examples(renderer: Renderer, examples: Sequence[Example], max_length: int) -> list[EncodedRow]:
    """Tokenise examples, each on its own, by a renderer that has begun; one EncodedRow for each, in order.

    Raises ContractError for an answer of a renderer that is not ours which its contract does not allow, and DataError
    for an example that the tokenizer cannot read.
    """
    try:
        found = renderer.batch(examples)
    except (TemplateRefusal, TokenizerFailure) as error:
        # One of them is refused: alone, each shows whether it is this one.
        if len(examples) > 1:
            return [encode_examples(renderer, [example], max_length)[0] for example in examples]
        if isinstance(error, TokenizerFailure):
            raise DataError(f"{examples[0].id} ({examples[0].source}): {error}") from error
        return [EncodedRow(["template_refused"], f": {shortened(str(error))}")]
    if type(renderer) is not ChatTemplate:
        if len(found) != len(examples):
            raise ContractError(
                f"renderer {renderer}: batch returned turns of {len(found)} conversations; it was given "
                f"{len(examples)}, and must return a list for each, in their order"
            )
        for example, turns in zip(examples, found, strict=True):
            _check_turns(renderer, example, turns)
    return [_masked(turns, renderer.ends, max_length) for turns in found]


def _check_turns(renderer: Renderer, example: Example, turns: Any) -> None:
    """Raise ContractError unless a renderer returned a turn for each trained one, of ids with weights."""
    try:
        fits = len(turns) == sum(message.trained for message in example.messages)
        for turn in turns:
            ids = turn.ids  # which are put together anew each time
            kinds = {type(token) for token in ids}
            fits = fits and all(issubclass(kind, Integral) and kind is not bool for kind in kinds)
            fits = fits and min(ids) >= 0 and all(0 <= weight <= MOST_WEIGHT**3 for _, weight in turn.parts)
            fits = fits and (len(ids) > len(turn.prompt) or bool(set(turn.reasons) & {*LOST}))
    except (TypeError, ValueError, AttributeError):  # no turns, or parts that are no pairs of ids and a number
        fits = False
    if not fits:
        raise ContractError(
            f"renderer {renderer} returned {quoted(turns)} for {example.id}; allowed: a turn for each trained "
            "one, with parts [(ids, weight), ...] of which ids are behind the prompt, and weights are from 0 to "
            f"{MOST_WEIGHT**3:g}"
        )


def _masked(turns: Sequence[RenderedTurn], ends: Sequence[int], max_length: int) -> EncodedRow:
    """Return the first max_length tokens of an example, and the spans of its responses in them; or why it has none.

    A conversation of several turns is split unless it begins with the tokens of every prompt and of every turn.
    """
    texts = [turn.ids for turn in turns]
    ids, reasons = texts[-1], sorted(set().union(*(turn.reasons for turn in turns)))
    if lost := [reason for reason in LOST if reason in reasons]:
        return EncodedRow(lost[:1])
    # Qwen3: the first prompt ends with "<think>\n\n</think>\n\n", and the second one leaves that out.
    if len(turns) > 1 and (APART.intersection(reasons) or any(ids[: len(text)] != text for text in texts)):
        return EncodedRow([SPLIT])
    if any(text[-1] not in ends for text in texts):  # ours end so; a renderer of a user may not
        return EncodedRow(["no_end_of_turn"])
    spans = list[tuple[int, int]]()
    weights = list[float]()
    for turn in turns:
        stop = len(turn.prompt)
        for part, weight in turn.parts:
            start = max(stop, 1)  # the first token of a text is predicted by nothing, and never a target
            stop = min(stop + len(part), max_length)
            if weight and start < stop:
                spans.append((start, stop))
                weights.append(weight)
    if not spans:
        return EncodedRow([*reasons, "no_response_token"])
    if len(ids) > max_length:
        reasons.append("truncated")
    return EncodedRow(reasons, ids=ids[:max_length], spans=spans, span_weights=weights)
