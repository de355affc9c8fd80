"""Templates of strangers: none runs a program, waits for ever or fills the memory; each ends in one line."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from sftmix.data.report import DataReport
from sftmix.data.tokenise import tokenise
from sftmix.options import DataOptions
from sftmix.ranks.world import World
from sftmix.text.encoder import encoder_for
from sftmix.text.mask import encode_examples
from sftmix.text.templates import CHATML, LETTERS, MEGABYTES, allowed
from sftmix.types import Example, Message
from sftmix.words.errors import ConfigError, DataError
from sftmix.words.fields import TEXT
from tests.forked import on_ranks
from tests.text.small_tokenizers import chatml_tokenizer, make_encoder
from tests.tiny import ROOT

FILLS = "{% set n = namespace(s='a') %}{% for i in range(40) %}{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s }}"
LOOPS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
TOO_MUCH = "the template takes more than 2.0 s of processor time, 2,048 MB of memory or 1,0"
CHATML_EOS = CHATML.replace("END", "eos_token")
PAYLOADS = {
    "class": ("{{ messages.__class__.__mro__[1].__subclasses__() }}", "SecurityError"),
    "globals": ("{{ cycler.__init__.__globals__.os.system('touch CANARY') }}", "SecurityError"),
    "lipsum": ("{{ lipsum.__globals__['os'].popen('touch CANARY').read() }}", "SecurityError"),
    "long range": ("{% for i in range(1000000000) %}x{% endfor %}", "OverflowError"),
    "nested ranges": (LOOPS, TOO_MUCH),
    "one operation": ("{{ 1 | round(-99999999) }}", TOO_MUCH),
    "long text": ("{{ 'a' * 3000000000 }}", TOO_MUCH),
    "growing text": (FILLS, TOO_MUCH),
    "wide filter": ("{{ 'x' | center(3000000000) }}", TOO_MUCH),
    "recursion": ("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "RecursionError"),
    "include": ("{% include '/etc/passwd' %}", "cannot render"),
    "10 MB": ("{{ 1 }}" * 1_500_000, "the template has 10,500,000 characters; allowed: at most 1,048,576"),
    "append": ("{{ messages.append({'role': 'user', 'content': 'x'}) }}", "SecurityError"),
    "undefined": ("{{ nothing.at.all }}", "UndefinedError"),
    "long output": ("{% for i in range(99999) %}{{ 'a' * 99 }}{% endfor %}", TOO_MUCH),
}
QUICK = ("growing text", "10 MB", "undefined")


def ends_in_one_line(world: World, source: str, reason: str, place: str) -> None:
    """In a process of its own, whose memory is its own."""
    path, canary = Path(place, "evil.jinja"), Path(place, "canary")
    path.write_text(source.replace("CANARY", str(canary)))
    make_encoder(chatml_tokenizer())
    began, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ConfigError) as caught:
        make_encoder(chatml_tokenizer(), str(path))
    assert str(caught.value).startswith("data.template: ")
    assert reason in str(caught.value)
    assert not canary.exists()
    assert time.process_time() - began < 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < (MEGABYTES + 256) << 10  # kB


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind in QUICK else pytest.mark.long) for kind in PAYLOADS]
)
def test_a_hostile_template_ends_in_one_line(kind, tmp_path):
    on_ranks(ends_in_one_line, *PAYLOADS[kind], str(tmp_path), ranks=1)


def hostile_on(word: str, payload: str = LOOPS) -> str:
    """ChatML with a payload for a conversation with a word in its last turn."""
    return "{% if messages[-1].content == '" + word + "' %}" + payload + "{% endif %}" + CHATML_EOS


def example(name: str, answer: str) -> Example:
    return Example(name, (Message("user", "Hi"), Message("assistant", answer, True)), f"rows.jsonl:{name}")


def test_a_template_that_hangs_on_a_row_ends_with_the_name_of_the_row(tmp_path):
    path = tmp_path / "evil.jinja"
    path.write_text(hostile_on("Zebra"))
    renderer = make_encoder(chatml_tokenizer(), str(path)).renderer
    assert renderer is not None
    rows = [example(str(k), "Zebra" if k == 7 else "Lion") for k in range(20)]
    began = time.process_time()
    message = r"^7 \(rows\.jsonl:7\): data\.template: the template takes more than 2\.0 s of processor time"
    with pytest.raises(ConfigError, match=message):
        encode_examples(renderer, rows, 100)
    assert time.process_time() - began < 4
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0, 0)
    assert signal.getsignal(signal.SIGVTALRM) is signal.SIG_DFL
    others = encode_examples(renderer, [row for row in rows if row.id != "7"], 100)
    assert [found.reasons for found in others] == [[]] * 19


def test_no_refusal_of_a_shape_swallows_a_template_that_hangs_on_it(tmp_path):
    """The layout tries shapes that templates may refuse: a system turn is one."""
    path = tmp_path / "evil.jinja"
    path.write_text(hostile_on("Green").replace("messages[-1].content == 'Green'", "messages[0].role == 'system'"))
    with pytest.raises(ConfigError, match=r"^data\.template: the template takes more than 2\.0 s"):
        make_encoder(chatml_tokenizer(), str(path))


REPEATED = "{{ messages[0].content * %s }}"


@pytest.mark.parametrize("payload", [FILLS, REPEATED % "999999999", REPEATED % "550000"])
def test_a_template_that_fills_the_memory_on_a_row_ends_with_the_name_of_the_row(payload, tmp_path):
    path = tmp_path / "evil.jinja"
    path.write_text(hostile_on("Zebra", payload))
    renderer = make_encoder(chatml_tokenizer(), str(path)).renderer
    before = resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(ConfigError, match=r"^7 \(rows\.jsonl:7\): .* 2,048 MB of memory or 1,048,[\d]+ characters"):
        encode_examples(renderer, [example("7", "Zebra")], 100)
    assert resource.getrlimit(resource.RLIMIT_AS) == before


STUCK = """
import signal, sys
from sftmix.text import templates
from tests.text.small_tokenizers import chatml_tokenizer, make_encoder

templates.STUCK = 1
make_encoder(chatml_tokenizer())
assert signal.getitimer(signal.ITIMER_PROF) == (0, 0)
print("begun", flush=True)
make_encoder(chatml_tokenizer(), sys.argv[1])
"""
COMPARED = (
    "{% set ns = namespace(a=[0], b=[0]) %}{% for i in range(45) %}{% set ns.a = [ns.a, ns.a] %}"
    "{% set ns.b = [ns.b, ns.b] %}{% endfor %}{{ ns.a == ns.b }}"
)


@pytest.mark.slow
def test_a_single_operation_that_looks_for_no_signal_ends_with_the_process(tmp_path):
    path = tmp_path / "evil.jinja"
    path.write_text(COMPARED)
    words = [sys.executable, "-c", STUCK, str(path)]
    done = subprocess.run(
        words, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=90
    )
    assert (done.returncode, done.stdout) == (-signal.SIGPROF, "begun\n"), done.stderr


def test_a_long_conversation_has_more_time_and_characters():
    """Half a second for each 50 turns, and one for each million characters, of functions as well."""
    turn = {"role": "user", "content": "x" * 10_000}
    assert allowed([turn] * 100, ()) == (pytest.approx(2 + 1 + 1), LETTERS + 10_000_000)
    assert allowed([], [{"name": "x" * 999_989}]) == (pytest.approx(3, abs=1e-3), LETTERS + 10_000_030)
    called = {"role": "assistant", "content": "", "tool_calls": ["x" * 1_000_000]}
    assert allowed([called], ())[0] == pytest.approx(3.01, abs=1e-3)


def runaway_tokenizer() -> PreTrainedTokenizerFast:
    """With an expression that takes 2 ** n steps for n letters x."""
    tokenizer = chatml_tokenizer()
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    split = {"type": "Split", "pattern": {"Regex": "(x+x+)+y"}, "behavior": "Isolated", "invert": False}
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, content["pre_tokenizer"]]}
    backend = Tokenizer.from_str(json.dumps(content))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=tokenizer.eos_token)


def test_an_expression_that_runs_away_ends_with_the_name_of_the_row():
    renderer = make_encoder(runaway_tokenizer(), "chatml").renderer
    assert renderer is not None
    rows = [example("1", "Lion"), example("2", "x" * 60)]
    with pytest.raises(DataError, match=r"^2 \(rows\.jsonl:2\): model\.path: its tokenizer cannot read this text"):
        encode_examples(renderer, rows, 100)


def test_an_expression_that_runs_away_ends_with_the_place_of_the_document():
    document = Example("", (Message(TEXT, "x" * 60, True),), "book.txt")
    renderer = encoder_for(runaway_tokenizer(), DataOptions(format=TEXT)).renderer
    with pytest.raises(DataError, match=r"\(book\.txt\): model\.path: its tokenizer cannot read this text"):
        list(tokenise([document], renderer, 10, DataReport(), splits=False))
