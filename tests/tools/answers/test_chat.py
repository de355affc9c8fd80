"""`chat`, scripted: commands, several turns by the training template, two models, Ctrl-C."""

from __future__ import annotations

import io
import re

import pytest

from sftmix.config.read import read_config
from sftmix.data.encoders import encoder_for
from sftmix.data.masks import encode_examples
from sftmix.model.load import load_tokenizer
from sftmix.tools.answers.answering import answered
from sftmix.tools.answers.chat import Talk, chat
from sftmix.tools.answers.options import AnswerOptions
from sftmix.tools.answers.questions import Question
from sftmix.types import Example, Message

OPTIONS = AnswerOptions(max_new_tokens=8)


@pytest.fixture
def prompts(lively, monkeypatch):
    """All prompts that the model was given, as it was given them."""
    seen, generate = [], lively.model.generate

    def spy(**options):
        seen.append(options["input_ids"][0].tolist())
        return generate(**options)

    monkeypatch.setattr(lively.model, "generate", spy)
    return seen


def said(models, *lines: str, options: AnswerOptions = OPTIONS) -> str:
    out = io.StringIO()
    chat(models, options, lines, out)
    return out.getvalue()


def test_each_prompt_is_the_training_render_of_the_conversation(lively, prompts, finished):
    talk, out = Talk(lively, AnswerOptions(max_new_tokens=8, system="Be brief.")), io.StringIO()
    for text in ("Add 2 and 3.", "And 4?", "Why?"):
        talk.answer(text, out)
    config = read_config(finished.path / "config.yaml")
    encoder = encoder_for(load_tokenizer(config.model.path), config.data)
    turns = [Message(m["role"], m["content"], m["role"] == "assistant") for m in talk.messages]
    (outcome,) = encode_examples(encoder, [Example("x", tuple(turns))], 1000)
    assert [m.role for m in turns] == ["system", *["user", "assistant"] * 3]
    assert prompts == [outcome.ids[:start] for start, _ in outcome.spans]
    assert all(turn.content.strip() for turn in turns)


def test_answers_are_those_of_generate_written_piece_by_piece(lively):
    out = Pieces()
    chat([lively], OPTIONS, ["Add 2 and 3."], out)
    question = Question("q", ({"role": "user", "content": "Add 2 and 3."},))
    ((answer,),) = answered(lively, [question], {}, OPTIONS)
    text = answer["answers"]
    assert re.search("[\x0b-\x1f]", text)  # it would move the cursor
    assert "".join(out.written) == re.sub("[\x00-\x08\x0b-\x1f\x7f-\x9f]", escaped, text) + "\n"
    assert len([piece for piece in out.written if piece]) > 4


def escaped(found: re.Match[str]) -> str:
    code = ord(found[0])
    return "\\r" if code == 13 else f"\\x{code:02x}"


class Pieces(io.StringIO):
    """Keeps what is written, call by call."""

    def __init__(self) -> None:
        super().__init__()
        self.written = list[str]()

    def write(self, text: str) -> int:
        self.written.append(text)
        return len(text)


def test_reset_and_system_begin_anew(lively, prompts):
    said([lively], "Hello", "/reset", "Hello", "/system Be brief.", "Hello", "/reset", "Hello", "/system", "Hello")
    hello = {"role": "user", "content": "Hello"}
    plain, brief = lively.render([hello]), lively.render([{"role": "system", "content": "Be brief."}, hello])
    assert prompts == [plain, plain, brief, brief, plain]


def test_quit_ends_help_helps_and_unknown_commands_are_named(lively, prompts):
    text = said([lively], "/help", "/nothing", "", "/quit", "Hello")
    assert text.startswith("/reset")
    assert "no command /nothing" in text
    assert prompts == []


def test_sampling_is_the_seeds(lively):
    options = AnswerOptions(max_new_tokens=8, temperature=1.0)
    first = said([lively], "Hello", options=options)
    assert said([lively], "Hello", options=options) == first
    assert said([lively], "Hello", options=AnswerOptions(max_new_tokens=8, temperature=1.0, seed=1)) != first


def test_ctrl_c_stops_the_answer_and_not_the_program(lively, monkeypatch):
    """It comes in the middle of an answer: what was written is kept as the answer, and the next line is answered."""
    forward, calls = lively.model.forward, []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return forward(*args, **kwargs)

    whole = Talk(lively, OPTIONS)
    whole.answer("Hello", io.StringIO())
    monkeypatch.setattr(lively.model, "forward", interrupted)
    talk, out = Talk(lively, OPTIONS), io.StringIO()
    assert not talk.answer("Hello", out)
    kept = talk.messages[-1]
    assert kept["role"] == "assistant"
    assert kept["content"]
    assert whole.messages[-1]["content"].startswith(kept["content"])
    assert out.getvalue() == kept["content"] + "\n"
    assert talk.answer("And now?", out)


@pytest.mark.parametrize("stopped", [0, 1])
def test_ctrl_c_takes_the_turn_back_in_both_conversations(lively, monkeypatch, stopped):
    """Each model answers the same questions, whichever of the two answers Ctrl-C stops."""
    asked, generate, forward = [], lively.model.generate, lively.model.forward

    def spy(**options):
        asked.append(options["input_ids"][0].tolist())
        return generate(**options)

    def interrupted(*args, **kwargs):
        if len(asked) == 3 + stopped and kwargs["input_ids"].shape[1] == 1:  # in the middle of an answer to "Two"
            raise KeyboardInterrupt
        return forward(*args, **kwargs)

    monkeypatch.setattr(lively.model, "generate", spy)
    monkeypatch.setattr(lively.model, "forward", interrupted)
    text = said([lively, lively], "One", "Two", "Three")
    assert text.count("the turn is taken back") == 1
    *_, first, second = asked
    assert len(asked) == 2 + 1 + stopped + 2
    monkeypatch.undo()
    talk = Talk(lively, OPTIONS)
    talk.answer("One", io.StringIO())
    expected = lively.render([*talk.messages, {"role": "user", "content": "Three"}])
    assert [first, second] == [expected, expected]


def test_a_conversation_as_long_as_the_context_says_so(lively):
    long = " w0" * 400
    text = said([lively], long, "Hello")
    assert "/reset begins anew" in text
    assert len(text.splitlines()) > 1


def test_two_models_answer_side_by_side_from_a_pipe(finished, sftmix, monkeypatch):
    """The command reads stdin, and ends with it."""
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\nAgain\n"))
    done = sftmix("chat", str(finished.path), "--beside", "base", "--max_new_tokens", "4")
    assert done.code == 0, done.err
    assert [line.partition(":")[0] for line in done.out.splitlines()] == ["target", "base"] * 2
    assert "chat: target, base" in done.err
    assert sftmix("chat", str(finished.path), "--beside", "target").code == 2


def test_bytes_that_are_no_text_are_answered_all_the_same(finished, sftmix, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8"))
    done = sftmix("chat", str(finished.path), "--max_new_tokens", "4")
    assert (done.code, done.out.count("\n")) == (0, 1), done.err
