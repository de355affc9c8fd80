"""`chat`, scripted: commands, several turns by the training template, two models, Ctrl-C."""

import contextlib
import io
import json
import re
import shutil

import pytest

from sftmix.tools.answers.answering import answered
from sftmix.tools.answers.chat import chat
from sftmix.tools.answers.options import AnswerOptions, Question
from sftmix.words.shown import as_lines

OPTIONS = AnswerOptions(max_new_tokens=8)


@pytest.fixture
def spied(lively, monkeypatch):
    """All prompts that the model was given, as it was given them, and the ids of its answers."""
    prompts, answers, generate = [], [], lively.model.generate

    def spy(**options):
        prompts.append(options["input_ids"][0].tolist())
        ids = generate(**options)
        answers.append(ids[0, len(prompts[-1]) :].tolist())
        return ids

    monkeypatch.setattr(lively.model, "generate", spy)
    return prompts, answers


def said(models, *lines: str, options: AnswerOptions = OPTIONS) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as out, pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
        chat(models, options)
    return out.getvalue()


def test_each_prompt_is_the_conversation_so_far(lively, spied):
    prompts, answers = spied
    asked, messages = ("Add 2 and 3.", "And 4?", "Why?"), [{"role": "system", "content": "Be brief."}]
    said([lively], *asked, options=AnswerOptions(max_new_tokens=8, system="Be brief."))
    for text, prompt, ids in zip(asked, prompts, answers, strict=True):
        messages.append({"role": "user", "content": text})
        assert prompt == lively.render(messages)
        messages.append({"role": "assistant", "content": lively.text_of(ids)})


def test_answers_are_those_of_generate_and_control_no_terminal(lively):
    text = answered_once(lively, "Add 2 and 3.")
    assert re.search("[\x0b-\x1f]", text)  # it would move the cursor
    assert said([lively], "Add 2 and 3.") == as_lines(text) + "\n"


def test_reset_begins_anew(lively, spied):
    said([lively], "Hello", "/reset", "", "Hello")
    assert spied[0] == [lively.render([{"role": "user", "content": "Hello"}])] * 2


def test_ctrl_c_takes_the_turn_back_in_all_conversations(lively, spied, monkeypatch):
    """Each model answers the same questions, also where Ctrl-C stops the second of two answers."""
    prompts, forward = spied[0], lively.model.forward

    def interrupted(*args, **kwargs):
        if len(prompts) == 4 and kwargs["input_ids"].shape[1] == 1:  # in the middle of the second answer to "Two"
            raise KeyboardInterrupt
        return forward(*args, **kwargs)

    monkeypatch.setattr(lively.model, "forward", interrupted)
    assert said([lively, lively], "One", "Two", "Three").count("the turn is taken back") == 1
    monkeypatch.undo()
    asked = [{"role": "user", "content": "One"}, {"role": "assistant", "content": answered_once(lively, "One")}]
    assert prompts[4:] == [lively.render([*asked, {"role": "user", "content": "Three"}])] * 2


def answered_once(loaded, text: str) -> str:
    question = Question("q", ({"role": "user", "content": text},))
    ((answer,),) = answered(loaded, [question], {}, OPTIONS)
    return answer["answers"]


def test_a_conversation_as_long_as_the_context_says_so(lively):
    first, *others = said([lively], " w0" * 400, "Hello").splitlines()
    assert first.endswith("/reset begins anew")
    assert others


def test_if_one_model_has_no_room_both_forget_the_turn(lively, spied):
    """The conversations stay the same, whose last turn before is asked with both."""
    narrow = lively._replace(name="narrow", context=len(spied_prompt(lively, "One")) + 40)
    out = said([lively, narrow], "One", " w0" * 20, "Two")
    assert out.count("/reset begins anew") == 1
    prompts = spied[0]
    assert (len(prompts), prompts[2]) == (4, prompts[3])
    assert prompts[2][: len(prompts[0])] == prompts[0]


def spied_prompt(loaded, text: str) -> list[int]:
    return loaded.render([{"role": "user", "content": text}])


def test_a_system_turn_may_be_a_file_and_rows_that_had_one_are_told(finished, sftmix, monkeypatch, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished.path, run)
    summary = json.loads((run / "summary.json").read_text())
    summary["data"]["counts"]["system"] = 7
    (run / "summary.json").write_text(json.dumps(summary))
    (tmp_path / "system.txt").write_text("Be brief.\n")
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert "7 of its rows had a system turn" in sftmix("chat", str(run)).err
    seen = []
    monkeypatch.setattr("sftmix.tools.answers.chat.chat", lambda models, options: seen.append(options.system))
    for given in (str(tmp_path / "system.txt"), "Be brief.", "x" * 5000):
        assert "system turn" not in sftmix("chat", str(run), "--system", given).err
    assert seen == ["Be brief.", "Be brief.", "x" * 5000]
    for encoding, said in (("cp1252", "can't decode byte 0xe8 in position 2"), ("utf-16", "it is in UTF-16")):
        (tmp_path / "system.txt").write_text("Très bref.\n", encoding)
        done = sftmix("chat", str(run), "--system", str(tmp_path / "system.txt"))
        assert done.code == 2
        assert re.search(rf"--system: .*system.txt cannot be read: .*{said}.*; save it as UTF-8", done.err), done.err


def test_a_closed_stdin_is_refused_before_a_model_is_loaded(finished, sftmix, monkeypatch):
    """As of `sftmix chat RUN <&-`."""
    monkeypatch.setattr("sys.stdin", None)
    monkeypatch.setattr("sftmix.tools.runs.loaded.load_finished", None)
    done = sftmix("chat", str(finished.path))
    assert (done.code, "error: chat reads what you say from stdin, which is closed" in done.err) == (2, True)


def test_two_models_answer_side_by_side_from_a_pipe(finished, sftmix, monkeypatch):
    """The command reads stdin, and ends with it."""
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\nAgain\n"))
    done = sftmix("chat", str(finished.path), "--beside", "base", "--max_new_tokens", "4")
    assert done.code == 0, done.err
    assert [line.partition(":")[0] for line in done.out.splitlines()] == ["target", "base"] * 2
    assert "chat: target, base" in done.err
