"""Templates of strangers: none runs a program, waits for ever or fills the memory; each ends in one line."""

import resource
import time
from pathlib import Path

import pytest

from sftmix.options import DataOptions
from sftmix.ranks.world import World
from sftmix.text.encoder import encoder_for
from sftmix.text.trial import CONVERSATIONS, PROBE
from sftmix.words.errors import ConfigError
from tests.forked import on_ranks
from tests.text.small_tokenizers import chatml_tokenizer

LOOPS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
PAYLOADS = {
    "class": ("{{ messages.__class__.__mro__[1].__subclasses__() }}", "SecurityError"),
    "globals": ("{{ cycler.__init__.__globals__.os.system('touch CANARY') }}", "SecurityError"),
    "lipsum": ("{{ lipsum.__globals__['os'].popen('touch CANARY').read() }}", "SecurityError"),
    "long range": ("{% for i in range(1000000000) %}x{% endfor %}", "OverflowError"),
    "nested ranges": (LOOPS, "exit code -9,"),
    "tracked": ("{% generation %}" + LOOPS + "{% endgeneration %}", "exit code -9,"),
    "long text": ("{{ 'a' * 3000000000 }}", "MemoryError"),
    "growing text": (
        "{% set n = namespace(s='a') %}{% for i in range(40) %}{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s }}",
        "MemoryError",
    ),
    "wide filter": ("{{ 'x' | center(2000000000) }}", "MemoryError"),
    "recursion": ("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "RecursionError"),
    "include": ("{% include '/etc/passwd' %}", "cannot render"),
    "10 MB": ("{{ 1 }}" * 1_500_000, "exit code -9,"),
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
QUICK = ("nested ranges", "loops on parts")


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


def test_the_probe_is_tried_out_first():
    """A template is rendered here only for conversations that it was tried out on."""
    assert [PROBE[:1], PROBE] == CONVERSATIONS[:2]
