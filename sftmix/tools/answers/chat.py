"""`chat`: a conversation with one finished model, or with two side by side, in a terminal."""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
from collections.abc import Sequence
from typing import Any

from sftmix.cli.results import say
from sftmix.common.shown import as_lines
from sftmix.tools.answers.options import AnswerOptions, add_sampling, sampling

ABOUT = """Talk to a finished model in the terminal, by the chat template and the stop ids of its training.

  sftmix chat runs/first
  sftmix chat runs/first --beside baseline       both models answer each question
  echo "Name three colours." | sftmix chat my-model --temperature 0.7

The line /reset forgets the conversation. Ctrl-C stops an answer and takes the turn back. Ctrl-D ends."""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("place", metavar="RUN_OR_MODEL", help="run directory, model directory or hub id")
    parser.add_argument(
        "--beside", metavar="NAME", help="a second model: baseline or base of the run, another run or a model"
    )
    add_sampling(parser)


def main(args: argparse.Namespace) -> None:
    """Load the models and talk until the user ends it."""
    from sftmix.pipeline.finished import finished_models

    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # a line that is no text in this encoding
    options, names = sampling(args), ["target", *([args.beside] if args.beside else [])]
    models = finished_models(args.place, names)
    say(f"chat: {', '.join(model.name for model in models)}; /reset forgets the conversation, Ctrl-D ends")
    from sftmix.pipeline.loaded import load_finished

    chat([load_finished(model, options.dtype) for model in models], options)


def chat(models: Sequence[Any], options: AnswerOptions) -> None:
    """Answer each line of stdin with every LoadedModel, until the lines end; /reset forgets all turns before."""
    beginning = [{"role": "system", "content": options.system}] if options.system else []
    conversations = [beginning for _ in models]
    sign = "> " if sys.stdin.isatty() else ""  # none from a pipe
    if sign:
        import readline  # noqa: F401  # arrow keys and a history for input()
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            line = input(sign).strip()
            if line == "/reset":
                conversations = [beginning for _ in models]
            elif line:
                turn, answered = {"role": "user", "content": line}, []
                try:  # all models or none: they are compared, so all must have been asked the same
                    for model, messages in zip(models, conversations, strict=True):
                        print(f"{model.name}: " if len(models) > 1 else "", end="")
                        answered.append(_answer(model, [*messages, turn], options))
                    conversations = answered
                except KeyboardInterrupt:
                    print("\nthe turn is taken back")


def _answer(loaded: Any, messages: list[dict[str, str]], options: AnswerOptions) -> list[dict[str, str]]:
    """Answer the last turn, write the answer while it is made, and return the conversation with it.

    A turn for whose answer the context has no room is forgotten. Raises DataError where the chat template refuses.
    """
    from transformers import TextStreamer

    from sftmix.tools.answers.answering import asked, generated

    def show(text: str, stream_end: bool = False) -> None:
        print(as_lines(text), end="\n" if stream_end else "", flush=True)  # no answer can control the terminal

    prompt, room = asked(loaded, messages, options, "chat")
    if not room:
        print(f"the conversation has {len(prompt)} tokens, of {loaded.context}: /reset begins anew")
        return messages[:-1]
    streamer = TextStreamer(loaded.encoder.tokenizer, skip_prompt=True, skip_special_tokens=True)
    streamer.on_finalized_text = show  # type: ignore[method-assign]
    key = "", "chat", sum(message["role"] == "assistant" for message in messages)
    (ids,) = generated(loaded, {key: prompt}, room, options.temperature or 0.0, options, streamer)
    return [*messages, {"role": "assistant", "content": loaded.text_of(ids)}]
