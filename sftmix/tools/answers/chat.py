"""A conversation with one finished model, or with two side by side, in a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TextIO

import torch
from transformers import GenerationConfig
from transformers.generation import BaseStreamer

from sftmix.common.shown import as_lines
from sftmix.data.templates import TemplateRefusal
from sftmix.pipeline.loaded import LoadedModel
from sftmix.tools.answers.options import AnswerOptions
from sftmix.tools.answers.sampling import processors, uniforms

HELP = """/reset        forget the conversation
/system TEXT  begin anew under a system turn; without a text: without one
/help         these lines
/quit         end, as Ctrl-D does; Ctrl-C stops an answer, and of two models takes the turn back"""


class Printer(BaseStreamer):
    """Writes an answer while it is made, as far as its tokens make whole characters; it cannot control the terminal."""

    def __init__(self, loaded: LoadedModel, out: TextIO) -> None:
        self._loaded, self._out = loaded, out
        self._ids, self._written = list[int](), 0
        self._is_prompt = True

    @property
    def text(self) -> str:
        """The answer so far."""
        return self._loaded.text_of(self._ids)

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt ids, which come first, or the next token."""
        if self._is_prompt:
            self._is_prompt = False
            return
        self._ids += value.flatten().tolist()
        text = self.text
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            self._write(text)

    def end(self) -> None:
        """Write what is left and end the line; call it again and nothing happens."""
        self._write(self.text)
        self._out.write("\n")
        self._out.flush()

    def _write(self, text: str) -> None:
        self._out.write(as_lines(text[self._written :]))
        self._out.flush()
        self._written = max(self._written, len(text))


@dataclass
class Talk:
    """One model with its side of the conversation."""

    loaded: LoadedModel
    options: AnswerOptions
    messages: list[dict[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.begin(self.options.system)

    def begin(self, system: str | None) -> None:
        """Forget the turns; keep or set the system turn."""
        self.messages = [{"role": "system", "content": system}] if system else []

    def answer(self, text: str, out: TextIO) -> bool:
        """Answer a turn of the user, and write the answer while it is made; return False if Ctrl-C stopped it.

        What was written before Ctrl-C is kept as the answer. A turn without an answer is forgotten.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        try:
            prompt = self.loaded.render(messages)
        except TemplateRefusal as error:
            out.write(f"the chat template refuses this conversation: {as_lines(str(error))}\n")
            return True
        room = self.options.max_new_tokens
        if self.loaded.context is not None:
            room = min(room, self.loaded.context - len(prompt))
        if room < 1:
            out.write(f"the conversation has {len(prompt)} tokens, of {self.loaded.context}: /reset begins anew\n")
            return True
        printer, whole = Printer(self.loaded, out), True
        try:
            self._generate(prompt, room, printer)
        except KeyboardInterrupt:
            printer.end()
            whole = False
        if printer.text:
            self.messages = [*messages, {"role": "assistant", "content": printer.text}]
        return whole

    @torch.inference_mode()
    def _generate(self, prompt: list[int], room: int, printer: Printer) -> None:
        model: Any = self.loaded.model  # its type has no generate
        options, ids = self.options, torch.tensor([prompt], device=model.device)
        turn = sum(message["role"] == "assistant" for message in self.messages)
        draws = uniforms(options.seed, [("chat", turn)], room) if options.temperature else None
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            generation_config=GenerationConfig(
                max_new_tokens=room,
                do_sample=False,
                eos_token_id=list(self.loaded.stop_ids),
                pad_token_id=self.loaded.encoder.pad_id,
            ),
            logits_processor=processors(options.temperature or 0.0, options.top_p, draws, len(prompt)),
            streamer=printer,
        )


def chat(models: Sequence[LoadedModel], options: AnswerOptions, lines: Iterable[str], out: TextIO) -> None:
    """Answer each line with every model, until the lines end or one of them is /quit.

    lines  what the user writes, a turn or a command in each
    """
    talks = [Talk(model, options) for model in models]
    for line in lines:
        text = line.strip()
        if text == "/quit":
            return
        if text.startswith("/"):
            _command(text, talks, out)
        elif text:
            _ask(text, talks, out)


def _ask(text: str, talks: Sequence[Talk], out: TextIO) -> None:
    before = [talk.messages for talk in talks]
    for talk in talks:
        if len(talks) > 1:
            out.write(f"{talk.loaded.name}: ")
        if not talk.answer(text, out):
            if len(talks) > 1:  # they are compared: all must have been asked the same
                for one, messages in zip(talks, before, strict=True):
                    one.messages = messages
                out.write("the turn is taken back, in the conversations of all models\n")
            return  # Ctrl-C means the question, not one of its answers


def _command(text: str, talks: Sequence[Talk], out: TextIO) -> None:
    name, _, rest = text.partition(" ")
    if name not in COMMANDS:
        out.write(f"no command {name}; {HELP}\n")
        return
    said = COMMANDS[name](talks, rest.strip())
    out.write(f"{said}\n")


def _reset(talks: Sequence[Talk], _: str) -> str:
    for talk in talks:
        first = talk.messages[0] if talk.messages else None
        talk.begin(first["content"] if first and first["role"] == "system" else None)
    return "the conversation begins anew"


def _system(talks: Sequence[Talk], text: str) -> str:
    for talk in talks:
        talk.begin(text or None)
    return "the conversation begins anew, " + ("under this system turn" if text else "without a system turn")


COMMANDS: dict[str, Callable[[Sequence[Talk], str], str]] = {
    "/reset": _reset,
    "/system": _system,
    "/help": lambda talks, rest: HELP,
}
"""What a line that begins with / does; each returns what is told. /quit ends the loop itself."""
