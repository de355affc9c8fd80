"""Signals that read the texts by rules: no model and no other row is asked."""

import operator
import re
from collections.abc import Callable

import numpy as np

from sftmix.tools.suspects.rows import SuspectRows
from sftmix.tools.suspects.signals import Signal
from sftmix.types import Float64


class OfTexts(Signal):
    """A signal with a number for each pair of prompt and response; 0 says nothing, and what is above stands out."""

    limit = 0.0
    relative = False
    rule: Callable[[str, str], float]

    def score(self, rows: SuspectRows) -> Float64:
        return np.array([type(self).rule(*texts) for texts in zip(rows.prompts, rows.responses, strict=True)], float)


# ---------------------------------------------------------------------------------------------- broken encodings


def _bytes_as(encoding: str, *numbers: int) -> str:
    """Return a class of characters: what the bytes are if a text is read in this encoding."""
    # Bytes that cp1252 leaves free are read as Latin-1, as browsers do.
    return "[" + re.escape("".join(_read(bytes([number]), encoding) for number in numbers)) + "]"


def _read(byte: bytes, encoding: str) -> str:
    try:
        return byte.decode(encoding)
    except UnicodeDecodeError:
        return byte.decode("latin-1")


def _misread(encoding: str) -> str:
    """Return a pattern of UTF-8 that was read in another encoding: letters and marks of Europe, signs, emoji."""
    tail = _bytes_as(encoding, *range(0x80, 0xC0))
    pieces = [
        _bytes_as(encoding, *range(0xC2, 0xC6)) + tail,  # é -> Ã©
        _bytes_as(encoding, 0xE2) + tail + "{2}",  # ’ -> â€™
        _bytes_as(encoding, 0xF0) + tail + "{3}",
        f"(?:{_bytes_as(encoding, 0xD0, 0xD1)}{tail}){{2,}}",  # two letters of Russian; one may be Ñ and a mark
    ]
    return "|".join(pieces[1:] if encoding == "cp1251" else pieces)  # "В»" also ends a quotation in Russian


BROKEN = re.compile(
    "\ufffd|ï¿½|锟|[\x80-\x9f]|â€|" + "|".join(map(_misread, ("cp1252", "cp1251", "mac_roman", "cp437")))
)
"""A place that was read in another encoding than it was written in, or that was lost."""


class BrokenEncoding(OfTexts):
    """Places of prompt and response that were read in another encoding: `itâ€™s`, `cafÃ©`, U+FFFD."""

    @staticmethod
    def rule(prompt: str, response: str) -> float:
        return len(BROKEN.findall(prompt)) + len(BROKEN.findall(response))


# ------------------------------------------------------------------------------------------------ short of words

PLACEHOLDER = re.compile(
    r"\W*+(n/?a|none|nil|null|nan|undefined|unknown|empty|todo|tbd|test|ok(ay)?|no ?(out|in)put"
    r"|no ?(answer|response|comment)|see (above|below)|(same )?as above|not (available|applicable|sure)"
    r"|i (don'?t|do not) know|sure|done|x+)?\W*",
    re.IGNORECASE,
)
REFUSAL = re.compile(
    r"^\W*(unfortunately\W+)?(i('| a)m|we('| a)re)? ?(very |so )?(sorry|afraid)\b(?! to hear| for| about)"
    r"|\bas an ai\b|\b(ai|language) model\b"
    r"|\b(cannot|can['’]t|can not|unable to|not able to|not allowed to|won['’]t) (be able to )?"
    r"(be (answered|generated|completed)|fulfil|assist|comply|help|answer|complete|provide|generate|access|process"
    r"|perform)",
    re.IGNORECASE,
)


class EmptyAnswer(OfTexts):
    """The response is a word that stands for none, such as N/A or TODO, or has no letter or digit."""

    @staticmethod
    def rule(prompt: str, response: str) -> float:
        return float(PLACEHOLDER.fullmatch(response) is not None)


class Refusal(OfTexts):
    """The response, in its first 200 characters, says that it cannot answer; the prompt does not use these words."""

    @staticmethod
    def rule(prompt: str, response: str) -> float:
        return float(bool(REFUSAL.search(response[:200])) and not REFUSAL.search(prompt))


OPEN = frozenset(
    re.findall(
        r"\w+",
        "a an the of to and or but nor in on at for with from by as is are was were be been being has have had that "
        "which who whose this these those their its his her your our my if when while because than into about between "
        "through during such can could will would should may might must not very more most each every some any",
    )
)
"""Words that seldom end a sentence."""
CODE = re.compile(r"[=;{}<>]|\b(def|return|SELECT|import)\b")
END = re.compile(r"[.!?…。!?:\"'”’»)\]}>`*|/%]$")


class CutShort(OfTexts):
    """The response ends inside a sentence, a bracket or a block of code: 1 if that is certain, 0.7 if not."""

    @staticmethod
    def rule(prompt: str, response: str) -> float:
        lines = [line.strip() for line in response.splitlines() if line.strip()]
        words = re.findall(r"[^\W_]+", response)
        if len(words) < 4:
            return 0.0
        last = re.sub(r"^\W*\w{1,4}[.)] ", "", lines[-1])  # "vi. Conclusion"
        if response.count("```") % 2 or re.search(r"[,(\[{–—-]$", last):
            return 1.0
        if END.search(last) or re.search(r"(#|@|https?:|www\.).", last.split()[-1]):
            return 0.0
        if words[-1].lower() in OPEN:
            return 1.0
        # Only the beginning looks as far as the end: if each sentence did, a long line would take hours.
        sentences = re.match(r"(?=.*\w$).*?[^\W\d_]{2}[.!?][\"')]*\s+[A-Z][a-z]* ", last)
        if sentences or last.rfind("(") > last.rfind(")"):
            return 1.0
        if CODE.search(response):
            return 0.0
        ends = [bool(re.search(r"[.!?]$", line)) for line in lines[:-1]]
        if ends:  # a list whose items have no mark has none behind the last
            return 0.7 * (sum(ends) > len(ends) / 2)
        # "The lion, as king of the" has few commas; "red, blue, green and white" many.
        sentence = last.count(",") < len(words) / 5 and sum(word in OPEN for word in words) >= 2
        title = sum(word[0].isupper() for word in words) > len(words) / 2
        return 0.7 * (len(words) >= 10 and sentence and not title)


# ------------------------------------------------------------------------------------------------------ languages

LANGUAGES = {
    "English": "the of and to is that it for as was with be are this you an from not have they in on a at by what how",
    "French": "le la les des une est et dans pour que qui sur vous avec ce pas plus sont aux du",
    "German": "der die das und ist nicht ein eine zu den mit sich auf für von dem es im sind auch",
    "Spanish": "el los las una que en por con para es del se su como más pero y lo al muy",
    "Italian": "il gli che di una per con non sono della è nel si più anche come questo ma lo dei",
    "Portuguese": "o os uma que não em para com é do da no na se mais como por mas ao são",
    "Dutch": "de het een en van is dat op te in voor met niet zijn aan er om ook als maar",
}
COMMON = {name: frozenset(words.split()) for name, words in LANGUAGES.items()}
SCRIPTS = re.compile(
    r"([A-Za-zÀ-ɏ])|([Ͱ-Ͽ])|([Ѐ-ӿ])|([\u0590-\u08ff])|([\u0900-\u0dff])|([\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af])"
)
"""A letter of one script: Latin, Greek, Cyrillic, Hebrew or Arabic, of India, of East Asia."""
NAMED = re.compile(
    r"translat|language|french|german|spanish|italian|portuguese|dutch|latin|greek|russian|arabic|hindi|chinese|japanese"
    r"|korean|hebrew|kanji",
    re.IGNORECASE,
)


def language_of(text: str) -> str:
    """Return the language whose common words a text has most, or the number of its script; "" if that is open."""
    scripts = [found.lastindex for found in SCRIPTS.finditer(text)]
    script = max({*scripts}, key=scripts.count, default=1)
    if script != 1:
        return f"script {script}"
    words = re.findall(r"[^\W\d_]+", text.lower())
    counts = {name: sum(word in common for word in words) for name, common in COMMON.items()}
    (_, second), (name, most) = sorted(counts.items(), key=lambda one: one[1])[-2:]
    return name if most >= max(second + 2, len(words) / 10) else ""


class OtherLanguage(Signal):
    """The response is in another language than most are and than its prompt is, which names no language."""

    limit = 0.0
    relative = False

    def score(self, rows: SuspectRows) -> Float64:
        asked, said = ([language_of(text) for text in texts] for texts in (rows.prompts, rows.responses))
        known = [*filter(None, said)]
        usual = max(dict.fromkeys(known), key=known.count, default="")  # of equal ones the first
        other = [one not in ("", usual, ask) for one, ask in zip(said, asked, strict=True)]
        named = [NAMED.search(prompt) is not None for prompt in rows.prompts]
        return np.array(other, float) * ~np.array(named, bool)


# -------------------------------------------------------------------------------------------------------- numbers

_N = r"(\d+(?:\.\d+)?)"
SUM = re.compile(rf"(?<![\d.+*/×x÷=^-])(?<![-+*/×x÷^] ){_N} ?([-+*/×x÷]) ?{_N} ?= ?(-?\d+(?:\.\d+)?)(?![\d^/])")
DOES: dict[str, Callable[[float, float], float]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "×": operator.mul,
    "x": operator.mul,
    "/": operator.truediv,
    "÷": operator.truediv,
}


class AlteredNumbers(OfTexts):
    """A sum of the response is wrong. A number that nothing in the row contradicts is not found."""

    @staticmethod
    def rule(prompt: str, response: str) -> float:
        wrong = 0
        for one, sign, other, result in SUM.findall(response.replace(",", "")):
            if sign not in "/÷" or float(other):
                places = len(result.partition(".")[2])
                wrong += abs(DOES[sign](float(one), float(other)) - float(result)) > 0.51 * 10.0**-places
        return wrong
