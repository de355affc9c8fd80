"""The base class of renderers: what makes token ids of conversations, beside the format that reads these from rows."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sftmix.components.component import Component
from sftmix.types import Example, Message, RenderedTurn
from sftmix.words.errors import TemplateRefusal


def as_turn(message: Message) -> dict[str, Any]:
    """Return a turn as transformers gives it to a chat template."""
    thought = {"reasoning_content": message.thought} if message.thought else {}  # the key of most templates
    return {"role": message.role, "content": message.content, **thought, **message.more}


class Renderer(Component, ABC):
    """A conversation -> the ids of its trained turns, behind the prompt that the exported model will be served with.

    Ours renders the tokenizer's chat template, or data.template; yours is chosen by its import path. The ids in front
    of a turn must be the prompt as `template` writes it. Keep nothing but what `begin` finds.
    """

    option = "renderer"
    instead = "; templates are chosen by data.template"
    tokenizer: Any = None
    cut = True
    """Examples are cut at data.max_length before `windows` gets them."""

    @property
    def packs(self) -> bool:
        """True if it has `windows` of its own."""
        return type(self).windows is not Renderer.windows

    def begin(self, tokenizer: Any, *, thinks: bool | None = False) -> None:
        """Take the tokenizer, before anything else is asked for.

        thinks  some response of the rows has a thought; None: it is not known, as after the training
        """
        self.tokenizer = tokenizer

    @property
    @abstractmethod
    def template(self) -> str:
        """The chat template that is exported with the model: a Jinja text, which may be a plain class attribute."""

    @property
    def ends(self) -> tuple[int, ...]:
        """The ids that end a turn; by default eos alone."""
        return (self.tokenizer.eos_token_id,)

    def prompt(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> list[int]:
        """Return the ids that generation starts from; the last of the messages is a user's, or a function's result.

        tools  the functions that the assistant may call
        """
        try:
            return self.tokenizer.apply_chat_template(  # type: ignore[no-any-return]
                [as_turn(message) for message in messages],
                tools=list(tools) or None,
                chat_template=self.template,
                add_generation_prompt=True,
                return_dict=False,
            )
        except Exception as error:  # a template may raise anything
            raise TemplateRefusal(f"{type(error).__name__}: {error}") from error

    @abstractmethod
    def answer(self, message: Message) -> list[tuple[list[int], float]]:
        """Return what a turn of the assistant adds to its prompt: parts of its ids, each with the weight of its loss.

        Parts of weight 0 are not trained. The last id is one of `ends`, and none before it is.
        """

    def ids(self, text: str) -> list[int]:
        """Tokenise a text; special tokens that it spells are tokens, and none is added."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]  # type: ignore[no-any-return]

    def turns(self, example: Example) -> list[RenderedTurn]:
        """Return the trained turns of a conversation, in order. Raises TemplateRefusal for one that it cannot write."""
        found = []
        for place, message in enumerate(example.messages):
            if message.trained:
                prompt = self.prompt(example.messages[:place], example.tools)
                found.append(RenderedTurn(prompt, self.answer(message)))
        return found

    def batch(self, examples: Sequence[Example]) -> list[list[RenderedTurn]]:
        """Return the trained turns of each conversation; a class that tokenises many texts faster may do so here."""
        return [self.turns(example) for example in examples]

    def windows(self, examples: Iterator[tuple[Example, Any]], length: int) -> Iterator[tuple[Example, Any]]:
        """Yield what is stored and trained: by default each example, as it comes.

        A class may put several examples into a window, which is an example with an id of its own. Tokens of different
        examples never attend to each other.

        examples  in file order, each with its `sftmix.text.EncodedRow`; those without a trained token are left out
        length    data.max_length, the most ids of a window
        The EncodedRow of a window has `starts`, and spans with a weight each.
        """
        return examples

    def text_of(self, ids: Sequence[int]) -> str:
        """Return an answer that the model has written, through the id before the one that ends its turn, as text."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
