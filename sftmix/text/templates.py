"""Chat templates: Jinja strings that `tokenizer.apply_chat_template` renders; our own, and changes to others."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from math import inf
from os.path import commonprefix
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sftmix.disk.places import place_of
from sftmix.disk.texts import read_text
from sftmix.types import Int64
from sftmix.words.errors import ConfigError, TemplateRefusal

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ALPACA = """\
{% for message in messages %}\
{% if message.role == 'system' %}{{ message.content + '\\n\\n' }}\
{% elif message.role == 'user' %}{{ '### Instruction:\\n' + message.content + '\\n\\n' }}\
{% elif message.role == 'assistant' %}{{ '### Response:\\n' + message.content + eos_token + '\\n\\n' }}\
{% else %}{{ raise_exception('alpaca has no turns of a ' + message.role) }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}"""

CHATML = """\
{% for message in messages %}\
{{ '<|im_start|>' + message.role + '\\n' + message.content + END + '\\n' }}\
{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

NAMED = {"alpaca": ALPACA, "chatml": CHATML}

Chat = Sequence[Mapping[str, Any]]
"""A conversation, of turns {role: ..., content: ...}, of which some have tool_calls, or a thought."""

# Codes are replaced, as Jinja has no dates: '%d %b %Y' (Llama 3.2) -> 26 Jul 2024, which Llama 3.1 has by default.
_SAME_DAY = """\
{% macro strftime_now(form) %}{% set ns = namespace(day=form) %}{% for code, value in [('%Y', '2024'), ('%y', '24'), \
('%B', 'July'), ('%b', 'Jul'), ('%m', '07'), ('%d', '26'), ('%-d', '26'), ('%e', '26'), ('%A', 'Friday'), \
('%a', 'Fri'), ('%w', '5'), ('%j', '208'), ('%H', '12'), ('%I', '12'), ('%p', 'PM'), ('%M', '00'), ('%S', '00')] %}\
{% set ns.day = ns.day | replace(code, value) %}{% endfor %}{{ ns.day }}{% endmacro %}"""
"""One date for templates that write the date of today: prompts must not change from day to day, nor at a resume."""


WITH_TOOLS = "{% if tools %}"
"""The head of a template that is two: one for conversations with functions, and one for others."""
WHOLE = "{{ '' }}"
"""Nothing, beside which a block takes no white space away."""


# ---------------------------------------------------------------------------------------------- bounds of renderings


SECONDS, EACH_TURN, EACH_LETTER = 2.0, 0.01, 1e-6
"""Processor time of a rendering: of any, and more for each turn and each character. Published templates take less than
a hundredth of it."""
TICK = 0.25
"""Seconds of the process's time as a user after which the clock looks at the call under way."""
STUCK = 300
"""Seconds of processor time, of all threads, after which SIGPROF ends a process whose clock has not looked meanwhile.
Python runs it between operations, and to compare two lists of lists may be a single operation without an end."""
MEGABYTES = 2048
"""Memory of renderings, on top of what the process has."""
LETTERS, TIMES = 1 << 20, 10
"""Most characters of a template; and of a rendering, which may have ten more for each character of its row."""


class OutOfTime(BaseException):
    """A call has used up its time.

    No Exception: it is raised in the middle of whatever runs, and code that catches every Exception would go on.
    """


@contextmanager
def bounded_memory() -> Iterator[None]:
    """Let the process take at most MEGABYTES more while the block runs. Elsewhere than on Linux nothing is bounded."""
    try:
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])  # the address space, as RLIMIT_AS counts it
    except (ImportError, OSError):
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_AS)
    size = pages * resource.getpagesize() + (MEGABYTES << 20)
    resource.setrlimit(resource.RLIMIT_AS, (min([size, *(limit for limit in before if limit >= 0)]), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


class Clock:
    """Ends calls that take too long, or too much memory.

    To start and stop it costs more than a short call, so one start may serve many.

    runs  it looks at the time
    left  seconds that the call under way has; inf: there is none
    """

    def __init__(self) -> None:
        self.runs = False
        self.left = inf

    def _tick(self, *_: object) -> None:
        signal.setitimer(signal.ITIMER_PROF, STUCK)
        self.left -= TICK
        if self.left < 0:
            raise OutOfTime  # and again at the next tick: within a __del__ it would be lost

    @contextmanager
    def running(self) -> Iterator[None]:
        """Run while the block does. Elsewhere than in the main thread, or on Windows, nothing is bounded."""
        if self.runs or not _in_main_thread() or not hasattr(signal, "setitimer"):
            yield
            return
        before = signal.signal(signal.SIGVTALRM, self._tick)
        self.runs = True
        try:
            self._tick()
            signal.setitimer(signal.ITIMER_VIRTUAL, TICK, TICK)
            with bounded_memory():
                yield
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            self.runs = False
            signal.signal(signal.SIGVTALRM, before or signal.SIG_DFL)  # None: no handler of Python
            signal.setitimer(signal.ITIMER_PROF, 0)  # last: a tick that was due has set it once more

    def call(self, seconds: float, function: Callable[..., Any], **given: Any) -> Any:
        """Return function(**given). Raises OutOfTime if it takes more than so many seconds, and a tick."""
        if not _in_main_thread():
            return function(**given)
        with self.running():
            self.left = seconds
            try:
                return function(**given)
            finally:
                self.left = inf


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


CLOCK = Clock()


def allowed(turns: Chat, tools: Sequence[Mapping[str, Any]]) -> tuple[float, int]:
    """Return the seconds of processor time, and the characters, that a rendering of turns and functions may take."""
    # Most turns have only a role and a content: of calls and thoughts all is counted as it is written.
    letters = sum(len(turn["content"]) if len(turn) == 2 else len(str(turn)) for turn in turns)
    letters += len(str(tools or ""))
    return SECONDS + EACH_TURN * len(turns) + EACH_LETTER * letters, LETTERS + TIMES * letters


# ------------------------------------------------------------------------------------------------ one template


class Template(NamedTuple):
    """A template as conversations are rendered with it.

    tokenizer  whose special tokens the template writes by their roles
    source     the Jinja text
    listed     it takes contents as lists of parts
    """

    tokenizer: PreTrainedTokenizerBase
    source: str
    listed: bool = False

    def rendered(self, *turns: Mapping[str, Any], prompt: bool = False, tools: Sequence[Mapping[str, Any]] = ()) -> str:
        """Render turns as transformers does. Raises TemplateRefusal if the template or its syntax fails, ConfigError if
        it takes more than is `allowed`.

        prompt  with the generation prompt
        tools   the functions that the assistant may call
        """
        from transformers.utils.chat_template_utils import render_jinja_template

        chat: Sequence[Mapping[str, Any]] = turns
        if self.listed:
            chat = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in turns]
        # Not []: Mistral v0.3 would write '[AVAILABLE_TOOLS] [[/AVAILABLE_TOOLS]'.
        given: Any = {"conversations": [chat], "tools": list(tools) or None, **token_roles(self.tokenizer)}
        given |= {"chat_template": on_the_same_day(self.source), "add_generation_prompt": prompt}
        seconds, letters = allowed(turns, tools)
        text = None
        try:
            text = str(CLOCK.call(seconds, render_jinja_template, **given)[0][0])
        except (OutOfTime, MemoryError):
            pass
        except Exception as error:  # a template may raise anything: RecursionError, OverflowError, ...
            raise TemplateRefusal(f"{type(error).__name__}: {error}") from error
        if text is None or len(text) > letters:
            raise ConfigError(
                f"data.template: the template takes more than {seconds:.1f} s of processor time, {MEGABYTES:,} MB of "
                f"memory or {letters:,} characters; choose another"
            )
        return text

    def tried(self, *turns: Mapping[str, Any], **more: Any) -> str:
        """Render turns; "" if the template refuses them."""
        with suppress(TemplateRefusal):
            return self.rendered(*turns, **more)
        return ""

    def marks(self, text: str) -> list[str]:
        """Return the added tokens of a text, but for white space, which some tokenizers add for any text."""
        added = self.tokenizer.added_tokens_decoder
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        # Gemma has "\n\n" and other runs of newlines among them.
        return [added[number].content for number in ids if number in added and added[number].content.strip()]


def template_source(template: str) -> str:
    """Return the Jinja source of alpaca, chatml or a file; raise ConfigError if there is none."""
    if template in NAMED:
        return NAMED[template]
    try:
        return read_text(place_of(template))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"data.template: {template!r} is neither one of {', '.join(NAMED)} nor a readable Jinja file ({error}); "
            "null takes the tokenizer's own"
        ) from error


def chosen(tokenizer: PreTrainedTokenizerBase, template: str | None) -> tuple[str, str]:
    """Return name and source of the template.

    Ours begin with BOS if the tokenizer itself writes one, and turns end with a token that it knows. If the tokenizer
    has another template for functions, its own is both in one.
    """
    named = tokenizer.chat_template
    if template is None and isinstance(named, dict) and {"default", "tool_use"} <= named.keys():
        # Command R and Hermes 2 Pro: transformers and servers take tool_use for conversations with functions.
        tools, default = (WHOLE + named[name].removesuffix("\n") + WHOLE for name in ("tool_use", "default"))
        return "tokenizer", f"{WITH_TOOLS}{tools}{{% else %}}{default}{{% endif %}}"
    if template is None and named:
        try:
            return "tokenizer", tokenizer.get_chat_template()
        except ValueError as error:  # several, and none of them is called default
            raise ConfigError(
                f"data.template: {error}. Write the one you want to a Jinja file and name that file, or choose chatml "
                "or alpaca"
            ) from error
    name = "alpaca" if template is None else template
    source = template_source(name)
    if name in NAMED:
        # Qwen2 has <|im_end|> already in its base model; a token that is added now would have an untrained embedding.
        source = source.replace("END", "'<|im_end|>'" if "<|im_end|>" in tokenizer.get_vocab() else "eos_token")
        if "eos_token" in source and tokenizer.eos_token is None:
            raise ConfigError("data.template: this tokenizer has no eos token, with which the template ends a response")
        source = ("{{ bos_token }}" if written_bos(tokenizer) else "") + source
    return name, source


def defaults(variables: Mapping[str, Any]) -> str:
    """Return the head of a template whose variables have these values unless they are given others."""
    lines = []
    for name, value in variables.items():
        # true and false are Jinja's as well, null is not, and \ud83d\ude00 would be two characters to it.
        given = "none" if value is None else json.dumps(value, ensure_ascii=False)
        lines.append(f"{{%- if {name} is not defined %}}{{%- set {name} = {given} %}}{{%- endif %}}")
    return "".join(lines)


def on_the_same_day(template: str) -> str:
    """Return the template with one date in place of today's."""
    return (_SAME_DAY if "strftime_now" in template else "") + template


def same_tokenizer(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    """True if both make the same ids of any text; what they pad with, which trainers choose, is in none of them."""
    first, second = ((token_roles(t) | {"pad_token": ""}, backend_text(t)) for t in (one, other))
    return first == second


def token_roles(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Return the spellings of a tokenizer's special tokens by their roles: bos_token, eos_token, ..."""
    return {role: str(token) for role, token in tokenizer.special_tokens_map.items()}


def backend_text(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return all of a tokenizer but the roles of its special tokens, as text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return json.dumps([type(tokenizer).__name__, sorted(tokenizer.get_vocab().items()), repr(tokenizer)])
    backend.no_truncation()  # else the last call's max_length would be part of the text
    backend.no_padding()
    return str(backend.to_str())


def written_bos(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return [BOS] if the tokenizer begins plain text with it when it adds special tokens, else []."""
    first = tokenizer("Name a colour.")["input_ids"][:1]  # add_bos_token is false in some that write one
    return first if first == [tokenizer.bos_token_id] else []


def decode(tokenizer: PreTrainedTokenizerBase, ids: list[int] | Int64) -> str:
    """Decode token ids; special tokens and white space stay as they are."""
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def common_start(one: Any, other: Any) -> Any:
    """Return what two texts, or two lists of ids, both begin with."""
    return commonprefix([one, other])  # noqa: RUF071  # of characters, as is meant


def count_within(tokenizer: PreTrainedTokenizerBase, ids: list[int], part: list[int]) -> int:
    """Return how many of the ids say no more than the text, with which they begin, that others are alone.

    part  the others: GPT-2's of "Five. " end with ' ', which in "Five. Four." is ' Four'
    """
    text, within = decode(tokenizer, part), len(common_start(part, ids))
    for count in range(within + 1, len(ids) + 1):
        said = decode(tokenizer, ids[:count])
        if text.startswith(said):
            within = count
        elif len(said.rstrip("\ufffd")) > len(text):  # the first tokens of an emoji end in up to three of these
            break
    return within
