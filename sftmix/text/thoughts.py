"""Thoughts: what a model writes before its answer, between tags that its chat template or its rows name.

A prompt may open a thought or close it: `written_behind`, what a rendering has behind a prompt, depends on these tags.
"""

from __future__ import annotations

import re

from sftmix.types import Example, Message
from sftmix.words.shown import visible

THOUGHT_FIELDS = ("reasoning_content", "thinking", "reasoning")
"""Fields of a turn that hold its thought, in the order in which templates are asked for them."""

TAGS = {
    "<think>": "</think>",  # DeepSeek-R1, Qwen3 and most others
    "<|START_THINKING|>": "<|END_THINKING|>",  # Command R7B
    "[THINK]": "[/THINK]",  # Ministral 3
    "<seed:think>": "</seed:think>",  # Seed-OSS
    "<|inner_prefix|>": "<|inner_suffix|>",  # Apertus
    "<|channel>thought": "<channel|>",  # Gemma 4
    "<|begin_of_thought|>": "<|end_of_thought|>",  # rows of OpenThoughts
}
"""Tags that open a thought, as models and rows write them, and those that close it."""

OPENING = "<think>\n"
INLINE = OPENING + "{thought}\n</think>\n\n"
"""A thought in front of the answer, for templates that know no thoughts and write the content as it is."""

_NAMED = r"<{}[\w:]*think[\w:]*>"  # <mm:think> of MiniMax-M3, <thinking>
"""Tags of that kind are closed with a slash, whatever else is in their names."""

_WORD = re.compile(r"[<\[]?[^<\[\s]+|[<\[]")  # "[/INST] <|im_start|>assistant\n" -> [/INST], <|im_start|>assistant
"""Text between white space; a tag begins one."""

_OPENING = "|".join([_NAMED.format(""), *map(re.escape, TAGS)])
_CLOSING = "|".join([_NAMED.format("/"), *map(re.escape, TAGS.values())])
_OPEN_AT_END = re.compile(rf"({_OPENING})(\s*)$")
_CLOSED_AT_END = re.compile(rf"(?:(?:{_OPENING})\s*)?(?:{_CLOSING})\s*$")  # "<think>\n\n</think>\n\n", "</think>"
_CLOSED_AT_HEAD = re.compile(rf"\s*(?:{_OPENING})?\s*(?:{_CLOSING})\s*")
_ENDS = {
    opening: re.compile(  # not quoted; behind it the end, a blank line, the answer, or, if text is before it, a newline
        # The quote is looked for behind the tag: a pattern that begins with the tag itself is searched for at once.
        rf"{closing}(?<![\"'`(\[]{closing})(?=\s*$|[^\S\n]*\n[^\S\n]*\n|[^\s\"'`)\],.;:]"
        rf"|(?<!\n{closing})[^\S\n]*\n)"
    )
    for opening, closing in zip(TAGS, map(re.escape, TAGS.values()), strict=True)
}
"""A closing tag that ends a line, or that the answer follows at once: quoted or in a sentence, it is spoken of, and so
it is alone on a line without a blank one behind it."""


def divided(content: str) -> tuple[str, str]:
    """Return the thought at the head of a response, and the answer behind it; ("", content) if there is none.

    A thought that is not closed was cut off, and has no answer. A response whose prompt had opened the thought has the
    closing tag only.
    """
    text = content.strip()
    for opening, closing in TAGS.items():
        if text.startswith(opening):  # up to the first closing tag: the answer behind it may speak of one
            thought, _, answer = text.removeprefix(opening).partition(closing)
            return thought.strip(), answer.strip()
    for opening, ends in _ENDS.items():  # rows of DeepSeek-R1: "Okay, so ...\n</think>\n\nFour."
        # In front of any opening tag: "Write <think>r</think>a" has no thought at its head.
        if closed := ends.search(text.partition(opening)[0]):
            return text[: closed.start()].strip(), text[closed.end() :].strip()
    return "", content


def answers(turn: Message) -> bool:
    """Return True if a turn says more than a thought: an answer, or a call."""
    return bool(visible(divided(turn.content)[1]) or turn.more.get("tool_calls"))


def _last_tag(text: str) -> int:
    """Return the only place where a tag at the end of a text may begin: to search a whole prompt takes longer."""
    return max(text.rfind("<"), text.rfind("["))


def opened_by(text: str, opening: str = "") -> str:
    """Return the tag, with the white space behind it, that opens a thought at the end of a text; "" if none does.

    opening  words of a template that open one as well
    """
    found = _OPEN_AT_END.match(text, _last_tag(text))
    return found[0] if found else opening if text.endswith(opening) else ""


def closed_by(text: str) -> bool:
    """Return True if a thought is closed at the end of a text."""
    return _CLOSED_AT_END.match(text, _last_tag(text)) is not None


def without_thought_tags(text: str, opening: str = "") -> str:
    """Return a text without the tags, or the `opening`, at its end that open, or close, a thought."""
    return _CLOSED_AT_END.sub("", text) if closed_by(text) else text.removesuffix(opened_by(text, opening))


def closing_at_head(text: str) -> str:
    """Return the tag at the head of a text that closes a thought, which may be empty, with the white space around."""
    found = _CLOSED_AT_HEAD.match(text)
    return found[0] if found else ""


def closing_of(opening: str) -> str:
    """Return what closes a thought that `opening` began, with the white space that its tag has."""
    tag = opening.rstrip()
    space = opening.removeprefix(tag)
    closing = TAGS.get(tag, f"</{tag[1:]}")
    # "<think>\n" -> "\n</think>\n\n", "<think>" -> "</think>"; Gemma 4: '<|channel>thought\n' -> '\n<channel|>'
    return space + closing + (2 * space if closing.startswith("</") else "")


def thinks(example: Example) -> bool:
    """Return True if a trained turn has a thought, in a field of its own or in its content."""
    return any(turn.trained and (turn.thought or divided(turn.content)[0]) for turn in example.messages)


# ---------------------------------------------------------------------------------------- behind the prompt


def text_before(text: str, marker: str) -> str:
    """Return what is in front of the last marker in a text; "" without one."""
    return text.rpartition(marker)[0]


def text_after(prompt: str, rendered: str, question: str) -> str | None:
    """Return a rendering behind a prompt, which may have another head and other white space around its header.

    question  the last turn of the prompt, or its end, which is nowhere else in the two
    """
    if rendered.startswith(prompt):
        return rendered[len(prompt) :]
    # Mistral v0.3: the system turn is written with the last turn of a user, and only if no answer follows it.
    header = prompt.rpartition(question)[2]
    turns = rendered.partition(question)[2]
    # DeepSeek-V3.1 of vLLM: the prompt has '\n  <|Assistant|>', the rendering '\n  <|Assistant|>    </think>'.
    spaced = r"\s*".join(map(re.escape, ["", *_WORD.findall(header), ""]))
    found = re.match(f"{re.escape(header)}|{spaced}", turns) if turns else None
    return turns[found.end() :] if found else None


def written_behind(
    prompt: str, rendered: str, question: str, closing: str, *, thinks: bool, opening: str = ""
) -> str | None:
    """Return what a rendered conversation has behind its prompt; None if it does not go on from there.

    A prompt that ends with the tags of a thought may stand for what the rendering lacks, or has in another form.

    question  the content of the last turn in the prompt
    closing   what closes a thought that the prompt opens and the response lacks
    thinks    the response has a thought
    opening   words of the template that open a thought at the end of a prompt; "" for none
    """
    opened = opened_by(prompt, opening)
    if not opened and (rest := text_after(prompt, rendered, question)) is not None:
        return rest
    before = without_thought_tags(prompt, opening)
    tags = prompt.removeprefix(before)
    rest = text_after(before, rendered, question)
    if rest is None:
        return None
    if rest.startswith(tags):
        rest = rest.removeprefix(tags)  # Nemotron 3 Nano: '<think>\n' is in both
    elif not thinks:  # Qwen3, exported: the prompt ends with '<think>\n\n</think>\n\n', the rendering has 'Blue' there
        rest = rest.removeprefix(closing_at_head(rest).rstrip())
    if opened:
        # axolotl's Qwen3: the prompt ends with '<think>\n\n', the rendering has '<think>\nSky' there. Nemotron Nano v2
        # writes the tag of its prompt, '<think>\n', in front of a content with a tag of its own: '<think>Sky</think>'.
        rest = re.sub(rf"^\s*{re.escape(opened.strip())}\s*", "", rest)
    # DeepSeek-R1: the prompt ends with '<think>\n', the rendering has 'Blue' there
    return closing + rest if opened and not thinks and not closing_at_head(rest) else rest
