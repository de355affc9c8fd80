"""Chat templates of a folder, each with rows of nine kinds: is what is trained right, wrong or refused?

    python benchmarks/templates.py FOLDER [--show NAME] [--out COUNTS.json]

FOLDER has a template in each *.jinja. The tokenizer knows each byte, and the marks that the template spells. It is made
twice: with the end of a turn as eos, as in chat models, and with another eos, as in base models. A turn is right if

- the ids in front of it are the prompt that transformers renders from the exported template;
- its thought, its answer and its call are in it once and in this order, and the thought is in tags of one kind;
- its last id ends a turn, and no id before it does;
- the prompt has each question, call and result of the turns before it, and nothing in front of the question is trained.
"""

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from sftmix.text.chat_template import ChatTemplate  # noqa: E402
from sftmix.text.examples import examples_of  # noqa: E402
from sftmix.text.formats import Columns, Converter  # noqa: E402
from sftmix.text.mask import LOST  # noqa: E402
from sftmix.text.templates import on_the_same_day  # noqa: E402
from sftmix.text.thoughts import thinks  # noqa: E402
from sftmix.types import Example, RenderedTurn  # noqa: E402
from sftmix.words.errors import ConfigError, TemplateRefusal  # noqa: E402

ASKED, AGAIN = ({"role": "user", "content": text} for text in ("Which fish swims upstream?", "And which one flies?"))
SALMON, FLYING = "The salmon.", "A flying fish."
THOUGHT, LATER = "Rivers are cold and fast.", "It is warm enough."
TOOL = {"name": "find_river", "description": "Find a river.", "parameters": {"type": "object", "properties": {}}}
CALL = {"id": "call12345", "type": "function", "function": {"name": "find_river", "arguments": {"fish": "salmon"}}}
RESULT = {"role": "tool", "name": "find_river", "tool_call_id": "call12345", "content": "The Tana."}
TOOLS = {"tools": [{"type": "function", "function": TOOL}]}


def says(content: str, **more: Any) -> dict[str, Any]:
    """Return a turn of the assistant."""
    return {"role": "assistant", "content": content, **more}


CALLS = says("", tool_calls=[CALL])
KINDS: dict[str, dict[str, Any]] = {
    "plain": {"messages": [ASKED, says(SALMON)]},
    "several turns": {"messages": [ASKED, says(SALMON), AGAIN, says(FLYING)]},
    "system turn": {"messages": [{"role": "system", "content": "Be brief and kind."}, ASKED, says(SALMON)]},
    "thought in a field": {"messages": [ASKED, says(SALMON, reasoning_content=THOUGHT)]},
    "thought in tags": {"messages": [ASKED, says(f"<think>\n{THOUGHT}\n</think>\n\n{SALMON}")]},
    "call": {"messages": [ASKED, CALLS], **TOOLS},
    "result": {"messages": [ASKED, CALLS, RESULT, says(SALMON)], **TOOLS},
    "flags": {"messages": [ASKED, says(SALMON, train=False), AGAIN, says(FLYING)]},
    "thought, call, result": {
        "messages": [
            *(ASKED, {**CALLS, "reasoning_content": THOUGHT}, RESULT),
            says(SALMON, reasoning_content=LATER),
        ],
        **TOOLS,
    },
}
"""Rows, each of a kind."""

SPECIAL = re.compile(r"<[|｜][^<>|｜\s]+[|｜]?>|<[^<>|｜\s/]+[|｜]>|<(?:start|end)_of_\w+>|\[/?[A-Z][A-Z_ ]+\]")
TAG = re.compile(r"</?(?:\w+:)?\w*(?:think|tool_call|tool_response)\w*>")
"""Marks that are tokens, special ones and others."""
END = re.compile(r"end|eot|eom|turn[|]>|return")
OPENED = re.compile(r"<[\w:]*think[\w:]*>|<[|]START_THINKING[|]>|\[THINK\]|<[|]inner_prefix[|]>|<[|]channel>thought")
CLOSED = re.compile(r"</[\w:]*think[\w:]*>|<[|]END_THINKING[|]>|\[/THINK\]|<[|]inner_suffix[|]>|<channel[|]>")


def tokenizer_of(source: str, *, base: bool) -> PreTrainedTokenizerFast:
    """Return a tokenizer of bytes that has the marks of a template; base: its eos ends no turn."""
    alphabet = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    special = dict.fromkeys(["<s>", "</s>", *SPECIAL.findall(source)])
    backend.add_tokens([AddedToken(mark, special=True, normalized=False) for mark in special])
    backend.add_tokens(
        [AddedToken(mark, special=False, normalized=False) for mark in dict.fromkeys(TAG.findall(source))]
    )
    ends = [mark for mark in special if END.search(mark) and "text" not in mark and "/" not in mark]
    eos = "</s>" if base or not ends else ends[0]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token=eos)
    tokenizer.chat_template = source
    return tokenizer


def faults(renderer: ChatTemplate, example: Example, place: int, turn: RenderedTurn) -> Iterator[str]:
    """Yield what is wrong with a trained turn."""
    tokenizer, message, before = renderer.tokenizer, example.messages[place], example.messages[:place]
    chat = [renderer.turn(other) for other in before]
    if renderer.layout.template.listed:
        chat = [{**other, "content": [{"type": "text", "text": other["content"]}]} for other in chat]
    served = tokenizer.apply_chat_template(
        chat,
        tools=list(example.tools) or None,
        chat_template=on_the_same_day(renderer.template),
        add_generation_prompt=True,
        return_dict=False,
    )
    if turn.prompt != served:
        yield "not behind the served prompt"
    response = turn.ids[len(turn.prompt) :]
    text, prompt = tokenizer.decode(response), tokenizer.decode(turn.prompt)
    if response[-1] not in renderer.ends or set(response[:-1]) & {*renderer.ends}:
        yield "does not end once"
    thought, answer = renderer.divided(message)
    said = [thought, answer, *(("find_river", "salmon") if message.more.get("tool_calls") else ())]
    places = [text.find(part.strip()) for part in said if part]
    if -1 in places or places != sorted(places) or any(text.count(part) != 1 for part in (thought, answer) if part):
        yield f"says {said} otherwise"
    yield from _tags(prompt, text, thought)
    for other in before:
        lost = [
            *(["find_river"] if other.more.get("tool_calls") else []),
            *([other.content] * (other.role != "assistant")),
        ]
        if "turn_lost" not in turn.reasons and any(part not in prompt for part in lost):
            yield f"the prompt lacks {lost}"
    head = prompt.partition(ASKED["content"])[0].strip()[-40:]
    if re.search(r"\w", re.sub(SPECIAL, "", head)) and head in text:
        yield f"trains the user's {head!r}"


def _tags(prompt: str, text: str, thought: str) -> Iterator[str]:
    """Yield what is wrong with the tags around the thought of a response."""
    opening = re.search(rf"(?:{OPENED.pattern})\s*$", prompt)
    front = text.partition(thought)[0] if thought else ""
    opened = [found[0] for found in OPENED.finditer((opening[0] if opening else "") + (text if not thought else front))]
    behind = text.partition(thought)[2] if thought else text
    closed = [found[0] for found in CLOSED.finditer(behind)]
    if not thought and not opened and text.startswith(closed[0] if closed else "</"):
        return  # MiniMax-M3 begins an answer without a thought with '</mm:think>'
    if len(opened) != len(closed) or len(opened) > 1 or (opened and _kind(opened[0]) != _kind(closed[0])):
        yield f"opened {opened}, closed {closed}"
    own = re.search(r"[\w][^\n]*\n?$", prompt)
    if own and "steps:" in own[0] and (opened or "[BEGIN FINAL RESPONSE]" not in text):
        yield f"the prompt opens its thought with {own[0]!r}"
    if thought and not opened and not re.search(r"\S", behind.partition(SALMON)[0]):
        yield "the thought is not closed"


def _kind(tag: str) -> str:
    return re.sub(r"\W|thought|START|END|prefix|suffix", "", tag).replace("/", "")


def outcome(tokenizer: PreTrainedTokenizerBase, row: dict[str, Any]) -> tuple[str, str]:
    """Return right, wrong, refused, or reported (the template leaves out a turn, as transformers does), and why.

    tokenizer  has the template
    """
    example = Converter(Columns(None), "messages", None, None, False).example(row)
    renderer = ChatTemplate()
    try:
        renderer.begin(tokenizer, thinks=thinks(example))
        problems, reasons = list[str](), Counter[str]()
        for one in examples_of(example, whole=False):
            (turn,) = renderer.batch([one])[0]
            reasons.update(turn.reasons)
            if not {*turn.reasons} & {*LOST}:
                problems += faults(renderer, one, len(one.messages) - 1, turn)
    except ConfigError as error:
        return "refused", str(error)
    except TemplateRefusal as error:
        return "refused", f"row: {error}"
    if problems:
        return "wrong", "; ".join(dict.fromkeys(problems))
    words = "refused" if {*reasons} & {*LOST} else "reported" if reasons["turn_lost"] else "right"
    return words, ", ".join(sorted(reasons))


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("folder", type=Path)
    options.add_argument("--show", default="")
    options.add_argument("--out", type=Path)
    asked = options.parse_args()
    found, whole = dict[str, dict[str, tuple[str, str]]](), Counter[str]()
    for path in sorted(path for path in asked.folder.glob("*.jinja") if asked.show in path.stem):
        source = path.read_text()
        found[path.stem] = {
            f"{kind}{', base' * base}": outcome(tokenizer_of(source, base=base), row)
            for kind, row in KINDS.items()
            for base in (False, True)
        }
        words = {word for word, _ in found[path.stem].values()}
        whole[next(word for word in ("wrong", "refused", "reported", "right") if word in words)] += 1
    counts = Counter((kind, word) for kinds in found.values() for kind, (word, _) in kinds.items())
    for kind in (f"{kind}{base}" for base in ("", ", base") for kind in KINDS):
        print(f"{kind:30}", *(f"{word} {counts[kind, word]:4}" for word in ("right", "wrong", "reported", "refused")))
    print(f"{len(found)} templates: {dict(whole)}")
    if asked.out:
        asked.out.write_text(json.dumps(found, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
