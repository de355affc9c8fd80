"""`chat`: a conversation with one finished model, or with two side by side, in a terminal."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from io import TextIOWrapper
from typing import TYPE_CHECKING, Any, TextIO

from sftmix.cli.results import say
from sftmix.cli.words import read_words
from sftmix.common.shown import as_lines
from sftmix.tools.answers.options import AnswerOptions, add_sampling, sampling

if TYPE_CHECKING:
    from sftmix.pipeline.loaded import LoadedModel

ABOUT = """Talk to a finished model in the terminal, by the chat template and the stop ids of its training.

  sftmix chat runs/first
  sftmix chat runs/first --beside baseline       both models answer each question
  echo "Name three colours." | sftmix chat my-model --temperature 0.7

Lines that begin with / are commands: /help lists them. Ctrl-C stops an answer and takes the turn back. Ctrl-D ends."""

HELP = """/reset        forget the conversation
/system TEXT  begin anew under a system turn; without a text: without one
/help         these lines
/quit         end, as Ctrl-D does; Ctrl-C stops an answer and takes the turn back"""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("place", metavar="RUN_OR_MODEL", help="run directory, model directory or hub id")
    beside = "a second model: baseline or base of the run, another run or a model"
    parser.add_argument("--beside", metavar="NAME", help=beside)
    add_sampling(parser)


def main(argv: Sequence[str]) -> None:
    """Load the models and talk until the user ends it."""
    given = read_words("chat", ABOUT, add_options, argv)
    if isinstance(sys.stdin, TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # bytes that are no UTF-8: no tokenizer takes what stands for them
    from sftmix.pipeline.finished import finished_models

    options = sampling(given)
    models = finished_models(given.place, ["target", *([given.beside] if given.beside else [])], option="--beside")
    say(f"chat: {', '.join(model.name for model in models)}; /help lists the commands, Ctrl-D ends")
    from sftmix.pipeline.loaded import load_for_use

    chat([load_for_use(model, options.dtype) for model in models], options, _lines(), sys.stdout)


def _lines() -> Iterator[str]:
    """Yield what the user writes; from a pipe without a prompt sign. Ctrl-C while writing drops the line."""
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    import readline  # noqa: F401  # arrow keys and a history for input()

    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\n(Ctrl-D or /quit ends)")


def chat(models: Sequence[LoadedModel], options: AnswerOptions, lines: Iterable[str], out: TextIO) -> None:
    """Answer each line with every model, until the lines end or one of them is /quit.

    lines  what the user writes, a turn or a command in each
    """
    beginning = _system(options.system)
    conversations = [beginning for _ in models]
    for line in lines:
        text = line.strip()
        name, _, rest = text.partition(" ")
        if name == "/quit":
            return
        if name in ("/reset", "/system"):
            beginning = beginning if name == "/reset" else _system(rest)
            conversations = [beginning for _ in models]
            out.write("the conversation begins anew\n")
        elif name.startswith("/"):
            out.write(HELP + "\n" if name == "/help" else f"no command {name}; {HELP}\n")
        elif text:
            turn = {"role": "user", "content": text}
            answered = []
            try:  # all models or none: they are compared, so all must have been asked the same
                for model, messages in zip(models, conversations, strict=True):
                    out.write(f"{model.name}: " if len(models) > 1 else "")
                    answered.append(_answer(model, [*messages, turn], options, out))
                conversations = answered
            except KeyboardInterrupt:
                out.write("\nthe turn is taken back\n")


def _system(text: str | None) -> list[dict[str, str]]:
    return [{"role": "system", "content": text}] if text else []


def _answer(
    loaded: LoadedModel, messages: list[dict[str, str]], options: AnswerOptions, out: TextIO
) -> list[dict[str, str]]:
    """Answer the last turn, write the answer while it is made, and return the conversation with it.

    A turn without an answer is forgotten.
    """
    from sftmix.data.templates import TemplateRefusal
    from sftmix.tools.answers.answering import generated, room_of

    try:
        prompt = loaded.render(messages)
    except TemplateRefusal as error:
        out.write(f"the chat template refuses this conversation: {as_lines(str(error))}\n")
        return messages[:-1]
    room = room_of(loaded, prompt, options)
    if not room:
        out.write(f"the conversation has {len(prompt)} tokens, of {loaded.context}: /reset begins anew\n")
        return messages[:-1]
    turn = sum(message["role"] == "assistant" for message in messages)
    (ids,) = generated(loaded, {("", "chat", turn): prompt}, room, options.at(0.0), options, Printer(loaded, out))
    text = loaded.text_of(ids)
    return [*messages, {"role": "assistant", "content": text}] if text else messages[:-1]


class Printer:
    """A streamer for transformers' generate: it writes an answer as far as its tokens make whole characters.

    No answer can control the terminal.
    """

    def __init__(self, loaded: LoadedModel, out: TextIO) -> None:
        self._loaded, self._out = loaded, out
        self._ids: list[int] | None = None
        self._written = 0

    def put(self, value: Any) -> None:
        """Take the prompt ids, which come first, or the next token."""
        if self._ids is None:
            self._ids = []
            return
        self._ids += value.flatten().tolist()
        text = self._loaded.text_of(self._ids)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            self._write(text)

    def end(self) -> None:
        """Write what is left and end the line."""
        self._write(self._loaded.text_of(self._ids or []) + "\n")

    def _write(self, text: str) -> None:
        self._out.write(as_lines(text[self._written :]))
        self._out.flush()
        self._written = max(self._written, len(text))
