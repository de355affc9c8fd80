"""Templates of strangers: none runs a program, waits for ever or fills the memory; each ends in one line."""

import json
import resource
import signal
import time
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from sftmix.data.report import DataReport
from sftmix.data.tokenise import tokenise
from sftmix.options import DataOptions
from sftmix.ranks.world import World
from sftmix.text.encoder import encoder_for, make_encoder
from sftmix.text.mask import encode_examples
from sftmix.text.templates import CHATML, seconds_for
from sftmix.text.thoughts import INLINE
from sftmix.text.trial import CONVERSATIONS, PROBE
from sftmix.types import Example, Message
from sftmix.words.errors import ConfigError, DataError
from sftmix.words.fields import TEXT
from tests.forked import on_ranks
from tests.text.small_tokenizers import chatml_tokenizer

FILLS = "{% set n = namespace(s='a') %}{% for i in range(40) %}{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s }}"
LOOPS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
PAYLOADS = {
    "class": ("{{ messages.__class__.__mro__[1].__subclasses__() }}", "SecurityError"),
    "globals": ("{{ cycler.__init__.__globals__.os.system('touch CANARY') }}", "SecurityError"),
    "lipsum": ("{{ lipsum.__globals__['os'].popen('touch CANARY').read() }}", "SecurityError"),
    "long range": ("{% for i in range(1000000000) %}x{% endfor %}", "OverflowError"),
    "nested ranges": (LOOPS, "exit code -9,"),
    "tracked": ("{% generation %}" + LOOPS + "{% endgeneration %}", "exit code -9,"),
    "long text": ("{{ 'a' * 3000000000 }}", "MemoryError"),
    "growing text": (FILLS, "MemoryError"),
    "growing text on arguments as text": (
        "{% if messages[1].tool_calls and messages[1].tool_calls[0].function.arguments is string %}"
        + FILLS
        + "{% endif %}",
        "MemoryError",
    ),
    "growing text on a thought in tags": (
        "{% if messages[-1].content is string and '<think>' in messages[-1].content %}" + FILLS + "{% endif %}",
        "MemoryError",
    ),
    "growing text on all but the questions of the trial": (
        "{% set said = messages[0].content %}{% if said is string and said not in ['Be short.', 'Name a colour.'] %}"
        + FILLS
        + "{% endif %}",
        "MemoryError",
    ),
    "wide filter": ("{{ 'x' | center(2000000000) }}", "MemoryError"),
    "recursion": ("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "RecursionError"),
    "include": ("{% include '/etc/passwd' %}", "cannot render"),
    "10 MB": ("{{ 1 }}" * 1_500_000, "it has 10,500,000 characters; at most 1,048,576"),
    "append": ("{{ messages.append({'role': 'user', 'content': 'x'}) }}", "SecurityError"),
    "undefined": ("{{ nothing.at.all }}", "UndefinedError"),
    "loops without a system turn": (
        "{% if messages[0].role == 'system' %}{{ raise_exception('none') }}{% endif %}" + LOOPS,
        "exit code -9,",
    ),
    "loops on parts": (
        "{% if messages[0].content is not string %}" + LOOPS + "{% endif %}{{ messages[0].content }}",
        "exit code -9,",
    ),
    "loops on functions": ("{% if tools %}" + LOOPS + "{% endif %}", "exit code -9,"),
    "loops on a thought": ("{% if messages[-1].thinking %}" + LOOPS + "{% endif %}", "exit code -9,"),
    "loops on a result": ("{% if messages[-1].role == 'tool' %}" + LOOPS + "{% endif %}", "exit code -9,"),
    "long output": ("{% for i in range(99999) %}{{ 'a' * 99 }}{% endfor %}", "MemoryError"),
}
QUICK = ("nested ranges", "growing text on all but the questions of the trial")


def ends_in_one_line(world: World, source: str, reason: str, place: str) -> None:
    """In a process of its own, of whose children nobody else knows."""
    path, canary = Path(place, "evil.jinja"), Path(place, "canary")
    path.write_text(source.replace("CANARY", str(canary)))
    options = DataOptions(train="rows.jsonl", template=str(path), cache_dir=str(Path(place, "cache")))
    with pytest.raises(ConfigError) as caught:
        encoder_for(chatml_tokenizer(), options)
    assert str(caught.value).startswith(f"data.template: {path}: ")
    assert reason in str(caught.value)
    assert not canary.exists()
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert used.ru_utime + used.ru_stime + time.process_time() < 10
    assert used.ru_maxrss < 1 << 20  # kB, the memory of this process included


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind in QUICK else pytest.mark.long) for kind in PAYLOADS]
)
def test_a_hostile_template_ends_in_one_line(kind, tmp_path):
    on_ranks(ends_in_one_line, *PAYLOADS[kind], str(tmp_path), ranks=1)


def test_a_good_template_is_tried_out_once(tmp_path):
    options = DataOptions(train="rows.jsonl", cache_dir=str(tmp_path / "cache"))
    encoder = encoder_for(chatml_tokenizer(), options)
    (kept,) = (tmp_path / "cache").glob("template-*")
    made = kept.stat().st_mtime_ns
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    assert encoder_for(chatml_tokenizer(), options).fingerprint == encoder.fingerprint
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime == before
    assert kept.stat().st_mtime_ns == made
    ours = DataOptions(train="rows.jsonl", template="chatml", cache_dir=str(tmp_path / "other"))
    encoder_for(chatml_tokenizer(), ours)
    assert not (tmp_path / "other").exists()


def hostile_on(word: str) -> str:
    """ChatML that loops on a conversation with a word in its last turn."""
    return (
        "{% if messages[-1].content == '" + word + "' %}" + LOOPS + "{% endif %}" + CHATML.replace("END", "eos_token")
    )


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


def test_a_long_conversation_has_more_time():
    """Half a second for each 50 turns, and one for each million characters, of functions as well."""
    turn = {"role": "user", "content": "x" * 10_000}
    assert seconds_for([turn] * 100, ()) == pytest.approx(2 + 1 + 1)
    assert seconds_for([], [{"name": "x" * 999_989}]) == pytest.approx(3, abs=1e-3)
    called = {"role": "assistant", "content": "", "tool_calls": ["x" * 1_000_000]}
    assert seconds_for([called], ()) == pytest.approx(3.01, abs=1e-3)


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


def test_the_trial_has_the_thought_in_tags_that_rows_have():
    assert [PROBE[0], {**PROBE[1], "content": INLINE.format(thought="Sky") + PROBE[1]["content"]}] in CONVERSATIONS


def test_the_probe_is_tried_out_first():
    """A template is rendered here only for conversations that it was tried out on."""
    assert [PROBE[:1], PROBE] == CONVERSATIONS[:2]
