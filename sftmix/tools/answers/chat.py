"""`chat`: a conversation with one finished model, or with two side by side, in a terminal."""

import contextlib
import io
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from sftmix.cli.say import say
from sftmix.tools.answers.options import Sampling
from sftmix.tools.runs.read import Reading, read_json_if_there
from sftmix.tools.runs.results import at
from sftmix.words.errors import ConfigError
from sftmix.words.shown import as_lines

ABOUT = """Talk to a finished model in the terminal, by the chat template and the stop ids of its training.

  sftmix chat runs/first
  sftmix chat runs/first --beside baseline       both models answer each question
  echo "Name three colours." | sftmix chat my-model --temperature 0.7

The line /reset forgets the conversation. Ctrl-C stops an answer and takes the turn back. Ctrl-D ends."""


@dataclass
class Options(Sampling, Reading):
    place: str
    """RUN_OR_MODEL: run directory, model directory or hub id"""
    beside: str | None = field(default=None, kw_only=True)
    """NAME: a second model: baseline or base of the run, another run or a model"""


def main(args: Options) -> None:
    """Load the models and talk until the user ends it."""
    from sftmix.tools.runs.models import finished_models

    if sys.stdin is None:  # chat RUN <&-
        raise ConfigError("chat reads what you say from stdin, which is closed; call it in a terminal, or from a pipe")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # a line that is no text in this encoding
    names = ["target", *([args.beside] if args.beside else [])]
    models = finished_models(args.place, names)
    say(f"chat: {', '.join(model.name for model in models)}; /reset forgets the conversation, Ctrl-D ends")
    summaries = (read_json_if_there(model.run / "summary.json") for model in models if model.run)
    rows = max((at(summary, "data.counts.system") or 0 for summary in summaries), default=0)
    if rows and not args.system:
        say(f"{rows:,} of its rows had a system turn, and this conversation has none: --system TEXT or FILE gives one")
    from sftmix.tools.runs.loaded import load_finished

    chat([load_finished(model, args.dtype) for model in models], args)


def chat(models: Sequence[Any], options: Sampling) -> None:
    """Answer each line of stdin with every LoadedModel, until the lines end; /reset forgets all turns before.

    A turn for whose answer the context of one of them has no room is answered by none, and forgotten. Raises DataError
    if a chat template refuses the conversation.
    """
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
            if line in ("", "/reset"):
                continue
            # One conversation for each model: their earlier answers differ.
            turns = [[*messages, {"role": "user", "content": line}] for messages in conversations]
            try:
                conversations = _answered(models, turns, options) or conversations  # []: the turn is forgotten
            except KeyboardInterrupt:
                print("\nthe turn is taken back")


def _answered(models: Sequence[Any], conversations: Sequence[Any], options: Sampling) -> list[Any]:
    """Show what each model answers, and return the conversations with it; none if one of the models has no room.

    All models or none: they are compared, so all must have been asked the same.
    """
    from transformers import TextStreamer

    from sftmix.tools.answers.answering import asked, generated

    names = [f"{model.name}: " if len(models) > 1 else "" for model in models]
    prompts = [asked(*one, options, "chat") for one in zip(models, conversations, strict=True)]
    for model, (prompt, room) in zip(models, prompts, strict=True):
        if not room:
            print(f"the conversation has {len(prompt)} tokens, of {model.context} of {model.name}: /reset begins anew")
            return []
    answered = []
    for model, name, messages, (prompt, room) in zip(models, names, conversations, prompts, strict=True):
        print(name, end="")
        streamer = TextStreamer(model.encoder.tokenizer, skip_prompt=True, skip_special_tokens=True)
        streamer.on_finalized_text = _show  # type: ignore[method-assign]
        key = "", "chat", (len(messages) - 1) // 2  # turn 0, 1, 2, with a system turn as well
        (ids,) = generated(model, {key: prompt}, room, options.temperature or 0.0, options, streamer)
        answered.append([*messages, {"role": "assistant", "content": model.text_of(ids)}])
    return answered


def _show(text: str, stream_end: bool = False) -> None:
    print(as_lines(text), end="\n" if stream_end else "", flush=True)  # no answer can control the terminal
