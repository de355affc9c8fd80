"""The renderer of a chat template: the prompt that the model is served with, and the response it is to write behind it.

The rendered text holds all special tokens and is tokenised with add_special_tokens=False, in training and in generation
alike: both see the same ids, and there is never a second BOS. Special tokens that a row spells in its text become text.
"""

import inspect
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, NamedTuple

from sftmix.components.component import require_one_of
from sftmix.components.renderer import Renderer
from sftmix.text.layout import layout_of
from sftmix.text.probes import with_text_arguments
from sftmix.text.spellings import SpecialSpellings
from sftmix.text.templates import CLOCK, WITH_TOOLS, Chat, chosen, count_within, decode, defaults, token_roles
from sftmix.text.thoughts import INLINE, closed_by, closing_at_head, divided, without_thought_tags, written_behind
from sftmix.text.values import MARK, ended, holds, holds_calls, left_out_of, place_behind
from sftmix.types import Example, Message, RenderedTurn
from sftmix.words.errors import ConfigError, TemplateRefusal
from sftmix.words.fields import SpecialTokens, Thoughts

_UNCALLED = ("template", "prompt", "answer", "turns")
"""What `batch` does not ask a ChatTemplate for: all turns are rendered there."""

PLACE = "place5b71cfb5"
"""Letters that no row has."""

MARK_IN_ESCAPES = r"\ufdd0"
"""How Python writes a mark in a list or an object, and JSON that is ASCII alone."""


class TurnText(NamedTuple):
    """A trained turn as text.

    prompt   what is in front of the response
    text     the response
    parts    the response through the end of each part, and the weight of the part
    reasons  to count
    """

    prompt: str
    text: str
    parts: list[tuple[str, float]]
    reasons: list[str]


class ChatTemplate(Renderer):
    """Renders what a chat template writes behind its own prompt; what it does not write there is put together.

    Training calls `batch`, which a subclass overrides; the other ways to a turn go through it.
    """

    def __init__(
        self,
        *,
        template: str | None = None,
        template_options: Mapping[str, Any] | None = None,
        special_tokens: SpecialTokens = "text",
        thoughts: Thoughts = "train",
    ) -> None:
        """template, template_options, special_tokens, thoughts: see `DataOptions`.

        Raises ConfigError for a subclass with methods of its own that training does not call.
        """
        if own := [name for name in _UNCALLED if getattr(type(self), name) is not getattr(ChatTemplate, name)]:
            raise ConfigError(
                f"renderer {type(self).__name__} has its own {', '.join(own)}, but training calls `batch`: override "
                "that (each turn that super().batch returns has its prompt, and parts with weights), or `render` for "
                "prompts; give the template as an option; or inherit from Renderer"
            )
        require_one_of("data.special_tokens", special_tokens, SpecialTokens)
        require_one_of("data.thoughts", thoughts, Thoughts)
        self.chosen = template
        self.template_options = template_options
        self.special_tokens = special_tokens
        self.thoughts = thoughts

    def begin(self, tokenizer: Any, *, thinks: bool | None = False) -> None:
        """Choose the template, and find what it writes around a response (`sftmix.text.layout`).

        thinks  the generation prompt is the one for thinking; None: it stays
        Raises ConfigError for an unknown name, for a template that cannot be rendered, and if no token can end a
        response.
        """
        from transformers.utils.chat_template_utils import render_jinja_template

        super().begin(tokenizer, thinks=thinks)
        self.name, source = chosen(tokenizer, self.chosen)
        options = self.template_options or {}
        # tools, documents, bos_token, ...: a value for one of these at the head of the template would never be read.
        given = {"messages", *inspect.signature(render_jinja_template).parameters, *token_roles(tokenizer)}
        if unread := [key for key in options if key in given or not re.search(rf"\b{re.escape(key)}\b", source)]:
            raise ConfigError(
                f"data.template_options names {', '.join(unread)}, which the template ({self.name}) does not read as a "
                "variable of its own; correct the name, or leave it out"
            )
        try:
            thinks = thinks and self.thoughts != "drop"  # None stays None
            self.layout = layout = layout_of(tokenizer, defaults(options) + source, thinks=thinks)
        except TemplateRefusal as error:
            raise ConfigError(
                f"data.template: {self.name}: cannot render a user and an assistant turn: {error}"
            ) from error
        ids = tokenizer.convert_tokens_to_ids([layout.end, *layout.around])
        self.spellings = SpecialSpellings(tokenizer, ids, self.special_tokens)
        self.notices = list[str]()
        if self.chosen is None and self.name == "alpaca":
            self.notices.append("The tokenizer has no chat template: using alpaca (data.template chooses another).")
        if source.startswith(WITH_TOOLS):
            self.notices.append("The tokenizer has another template for functions: both are used, and exported as one.")
        if "strftime_now" in source:
            self.notices.append("The template writes the date: 26 July 2024 is used on every day.")
        self.notices += layout.notices

    @property
    def template(self) -> str:
        """The template in use, with the defaults that the exported one has."""
        return self.layout.template.source

    @property
    def ends(self) -> tuple[int, ...]:
        """The id that ends a response, and the one that ends a call, if it is another."""
        ends = self.tokenizer.convert_tokens_to_ids([self.layout.end, self.layout.call_end])
        return tuple(dict.fromkeys(ends))

    # ------------------------------------------------------------------------------ conversations and responses

    def turn(self, message: Message, *, last: bool = False) -> dict[str, Any]:
        """Return a turn as the template takes it: its thought by its key, its special tokens as text.

        last  it is the response: if the template knows no thoughts, a thought without an opening tag gets one
        """
        layout = self.layout
        turn: dict[str, Any] = {"role": message.role, "content": message.content, **message.more}
        if layout.text_arguments and turn.get("tool_calls"):
            turn = with_text_arguments(turn)  # DeepSeek-V3: '```json' + '\n' + tool['function']['arguments']
        if message.role == "assistant":
            thought, answer = self.divided(message)
            if thought and layout.key:
                turn |= {"content": answer, layout.key: thought}  # Qwen3: reasoning_content
            elif layout.key != "" or self.thoughts == "drop":
                turn["content"] = answer  # an empty thought before it is the template's business
            elif last and thought and (message.thought or message.content.lstrip().startswith(thought)):
                turn["content"] = INLINE.format(thought=thought) + answer  # DeepSeek-R1: "2 + 2\n</think>\n\nFour."
        return {key: value if key == "role" else self.spellings.as_text(value) for key, value in turn.items()}

    def divided(self, message: Message) -> tuple[str, str]:
        """Return the thought of an assistant turn and its answer; "" if it has none, or thoughts are dropped."""
        thought, answer = (message.thought, message.content) if message.thought else divided(message.content)
        return ("" if self.thoughts == "drop" else thought), answer

    def render(self, chat: Chat, *, prompt: bool, tools: Sequence[Mapping[str, Any]] = ()) -> str:
        """Render a conversation; `prompt` adds the generation prompt.

        chat   turns as `turn` makes them
        tools  functions that the assistant may call, in which special tokens are text
        Raises TemplateRefusal, also for a template that writes the mark of a special token in escapes.
        """
        text = self.layout.template.rendered(*chat, prompt=prompt, tools=tools)
        if MARK_IN_ESCAPES in text:
            raise TemplateRefusal("it writes a row in escapes (or a row says \\ufdd0): special tokens may be hidden")
        return text

    def prompt(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> list[int]:
        """Return the ids that generation starts from."""
        chat = [self.turn(message) for message in messages]
        return self.spellings.tokenize([self.render(chat, prompt=True, tools=self.spellings.as_text(tools))])[0]

    def answer(self, message: Message) -> list[tuple[list[int], float]]:
        """Return the parts of a response to a question that says nothing."""
        return self.turns(Example("", (Message("user", "Hi"), message)))[-1].parts

    def turns(self, example: Example) -> list[RenderedTurn]:
        """Return the trained turns of a conversation: as the template writes them behind the prompt, or composed."""
        return self.batch([example])[0]

    def batch(self, examples: Sequence[Example]) -> list[list[RenderedTurn]]:
        """Return the trained turns of each conversation, all tokenised together."""
        with CLOCK.running():
            written = [self._turn_texts(example) for example in examples]
        texts = [text for of_one in written for turn in of_one for text in (turn.prompt, turn.prompt + turn.text)]
        ids = iter(self.spellings.tokenize(texts))
        return [[self._tokens(turn, next(ids), next(ids)) for turn in of_one] for of_one in written]

    def _turn_texts(self, example: Example) -> list[TurnText]:
        """Return the trained turns of a conversation as text; ConfigError, with its name, if it takes too long."""
        example = replace(example, tools=self.spellings.as_text(example.tools))
        chat = [self.turn(message) for message in example.messages]
        found = list[TurnText]()
        held, through = "", 0  # a prompt that leaves nothing out, and the number of its turns
        for place, message in enumerate(example.messages):
            if not message.trained:
                continue
            try:
                turn = self._response(example, chat[:place], message)
            except ConfigError as error:
                raise ConfigError(f"{example.id} ({example.source}): {error}") from error
            known = through if turn.prompt.startswith(held) else 0
            tools = () if known else example.tools
            bare = self.layout.template.tried(*chat[:place], prompt=True) if tools else ""
            lost = left_out_of(turn.prompt, bare, tools, chat[known:place], len(held) if known else 0)
            turn.reasons.extend(lost)
            found.append(turn)
            if not lost:
                held, through = turn.prompt, place
        return found

    def _response(self, example: Example, before: Chat, message: Message) -> TurnText:
        """Put a response behind its prompt: a call, or an answer as the template writes it there, or else its parts.

        before  the turns in front of it
        """
        thought, answer = map(self.spellings.as_text, parts := self.divided(message))
        prompt = self.render(before, prompt=True, tools=example.tools)
        if closed_by(prompt):
            if thought:
                raise TemplateRefusal("its prompt closes the thought that the response has")
            message = replace(message, content=parts[1])  # SmolLM3 has a row's own empty block behind its prompt's
        begun = self.layout.begun(prompt, thought)
        if message.more.get("tool_calls"):
            text, more = self._called(example, before, message, prompt, begun, thought, answer)
        else:
            found = self._answered(example, before, message, prompt, thought, answer)
            text, more = found or (begun + answer + self.layout.ending, ["composed"])
        if MARK in prompt + text:
            more.append("spelt_special")
        return TurnText(prompt, text, self._weights(message, text, answer), more)

    def _behind(
        self, example: Example, before: Chat, last: Mapping[str, Any], prompt: str, *, thinks: bool
    ) -> tuple[str, list[str]] | None:
        """Return what the template writes behind a prompt and reasons to count; None if it does not go on from there.

        last    the response, which has a thought if it `thinks`
        """
        layout, tools = self.layout, example.tools
        question = before[-1]["content"].strip()
        rendered = self.render([*before, last], prompt=False, tools=tools)
        # Mistral v0.3: '[INST] Be kind.\n\nHi[/INST]' is the prompt, '[INST] Hi[/INST] Yo' is rendered.
        as_asked = rendered.startswith(without_thought_tags(prompt, layout.opening))
        if not rendered.startswith(prompt) and (prompt + rendered).count(question) != 2:  # also elsewhere in them
            question = PLACE  # if the question is "a", so may the template's own words be
            chat = [*before[:-1], {**before[-1], "content": before[-1]["content"] + PLACE}]
            prompt = self.render(chat, prompt=True, tools=tools)
            rendered = self.render([*chat, last], prompt=False, tools=tools)
        behind = written_behind(prompt, rendered, question, layout.closing, thinks=thinks, opening=layout.opening)
        return None if behind is None else (behind, [] if as_asked else ["composed"])

    def _answered(
        self, example: Example, before: Chat, message: Message, prompt: str, thought: str, answer: str
    ) -> tuple[str, list[str]] | None:
        """Return an answer as the template writes it, and reasons; None if a part is left out, or in other words."""
        behind = self._behind(example, before, self.turn(message, last=True), prompt, thinks=bool(thought))
        # A template without a key for thoughts may seem to write a short one, in other words. Kimi-K2-Thinking writes
        # an empty thought in front of one in the content: '<think></think><think>\nSky'.
        if behind is None or (thought and (self.layout.key is None or closing_at_head(behind[0]))):
            return None
        place = place_behind(behind[0], thought, answer)  # -1: R1 leaves the thought out
        return None if place < 0 else (ended(behind[0], place, {self.layout.end}, self.layout.ending), behind[1])

    def _called(
        self, example: Example, before: Chat, message: Message, prompt: str, begun: str, thought: str, answer: str
    ) -> tuple[str, list[str]]:
        """Return a call as the template writes it, through the token behind it, with its thought in front of it."""
        last = self.turn(message, last=True)
        behind = None
        with suppress(TemplateRefusal):  # Mistral's take no content, and no thought in it, beside a call
            behind = self._behind(example, before, last, prompt, thinks=bool(thought))
        name = last["tool_calls"][0]["function"]["name"]
        if behind is None or (thought and place_behind(behind[0], thought, name) < 0):
            # EXAONE 4 leaves the thought out there; Gemma 4 writes the content, and a thought in it, behind calls.
            bare = self.turn(replace(message, thought="", content=self.divided(message)[1]))
            rest, reasons = self._behind(example, before, bare, prompt, thinks=False) or ("", [])
            behind = begun + rest.removeprefix(closing_at_head(rest) or self.layout.closing), reasons
        text = ended(behind[0], 0, {self.layout.call_end, self.layout.end}, self.layout.call_end)  # gpt-oss: <|call|>
        # Command A leaves out an answer beside a call.
        return text, behind[1] if holds(text, answer) and holds_calls(text, last) else ["calls_lost"]

    def _weights(self, message: Message, text: str, answer: str) -> list[tuple[str, float]]:
        """Return a response through each of its parts, with their weights; the last one is through its end.

        What is in front of the answer, a thought, has the weight of the turn. Raises TemplateRefusal for parts that are
        not found: in escapes, or beside calls.
        """
        if not message.parts:
            return [(text, message.weight)]
        said = answer.strip()
        start = text.removesuffix(self.layout.ending).rfind(said)
        if message.more or start < max(place_behind(text, message.thought), 0):
            raise TemplateRefusal("it writes the answer in escapes or beside calls, where its parts are not found")
        # Templates trim answers: of " Wrong." and " Right." they write "Wrong. Right.".
        end = start - (len(answer) - len(answer.lstrip()))
        parts = [(text[:start], message.weight)] if message.thought else []
        for part, weight in message.parts:
            end += len(self.spellings.as_text(part))
            parts.append((text[: max(start, end)], weight * message.weight))
        return [*parts[:-1], (text, parts[-1][1])]

    # -------------------------------------------------------------------------------------------------- tokens

    def _tokens(self, turn: TurnText, front: list[int], ids: list[int]) -> RenderedTurn:
        """Return the ids of a prompt, and of the response behind it, which is tokenised apart where a token spans both.

        front  the ids of the prompt
        ids    those of the prompt and the response as one text
        """
        prompt, text, parts, reasons = turn
        if ids[: len(front)] != front:  # GPT-2: "### Response:\n" + "\n\n1." is ..., '\n\n', '\n', '1', ...
            # Behind a special token, so that no tokenizer takes the response for the beginning of a text.
            anchor = self.ends[0]
            (behind,) = self.spellings.tokenize([str(self.tokenizer.convert_ids_to_tokens(anchor)) + text])
            apart = front + behind[1:]
            if behind[:1] != [anchor] or decode(self.tokenizer, apart) != decode(self.tokenizer, ids):
                return RenderedTurn(front, [], ["prefix_mismatch"])
            ids = apart
            reasons.append("boundary")
        place = len(front)
        cut = list[tuple[list[int], float]]()
        for through, weight in parts:
            stop = len(ids)
            if through != text:
                (part,) = self.spellings.tokenize([prompt + through])
                stop = max(place, count_within(self.tokenizer, ids, part))  # a token across the end is the next part's
            cut.append((ids[place:stop], weight))
            place = stop
        return RenderedTurn(front, cut, reasons)

    def text_of(self, ids: Sequence[int]) -> str:
        """Decode an answer, without what the template writes around it."""
        layout = self.layout
        # As ids, before they are decoded: gpt-oss has '<|channel|>final<|message|>', of which 'final' would be left.
        (lead,) = self.spellings.tokenize([layout.answer_lead])
        text = super().text_of(ids[len(lead) :] if list(ids[: len(lead)]) == lead else ids)
        # Mistral's lead ' ' is in the first word's token; '<|END_RESPONSE|>' of Command R7B is in front of the end.
        return text.removeprefix(layout.answer_lead).removesuffix(layout.ending.removesuffix(layout.end))
