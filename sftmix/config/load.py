"""YAML text -> plain values, with every key as text, and with numbers that are decimal ones.

A file may be from anyone: it repeats no key, and has no more values than a configuration needs.
"""

import re
from typing import Any

import yaml

_LONGEST, _MOST, _DEEPEST = 1 << 20, 100_000, 100
"""Most characters of a text, which are seconds of reading; most values and levels, with what its aliases name."""
_TOO_DEEP = f"with its aliases it has over {_DEEPEST} levels"
_NO_DECIMAL = re.compile(r"[-+]?0[0-9_]+|.*:.*")
"""Numbers that YAML 1.1 reads as nobody means them: 010 is octal, so 8, and 1:30 is of base 60, so 90."""
_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
_TEXT, _MERGE = "tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"


def load(text: str, *, texts: bool = False) -> Any:
    """Return what a text is to YAML.

    010 and 1:30, to YAML 1.1 the numbers 8 and 90, are text: an option of numbers takes 010 as 10, and refuses 1:30.
    Raises ValueError, with a message of one line, for what is no YAML, is too deep or too large, or repeats a key.

    texts  scalars stay as they are written, also those that YAML would take for numbers, dates, true or false, as `no`
    """
    if len(text) > _LONGEST:
        raise ValueError(f"it has {len(text):,} characters; at most {_LONGEST:,} are read")
    loader = yaml.BaseLoader if texts else yaml.SafeLoader  # in Python, as the one in C crashes if lists are too deep
    try:
        reader = loader(text)
        document = reader.get_single_node()  # nodes first: values have lost their lines, repeated keys and spellings
        _check(document)
        return None if document is None else reader.construct_document(document)
    except yaml.MarkedYAMLError as error:
        raise ValueError(f"line {error.problem_mark.line + 1}: {error.problem}") from error
    except Exception as error:
        # 2024-13-01 is no date, [[[... is too deep, and NUL is no character; some of the messages have several lines.
        # `!!bool x` is a KeyError, `!!timestamp x` an AttributeError.
        message = "a tag does not fit its value" if isinstance(error, LookupError | AttributeError) else str(error)
        message = _TOO_DEEP if isinstance(error, RecursionError) else message
        raise ValueError(" ".join(message.split())) from error


def _check(document: yaml.Node | None) -> None:
    """Raise ValueError for a document that repeats a key, or unfolds to too many values or levels; make misread numbers
    text."""
    nodes = [(document, 0)]  # `base: &a [*a]` holds itself: without a limit this would not end
    seen = 0
    while nodes:
        node, level = nodes.pop()
        seen += 1
        if seen + len(nodes) > _MOST:
            raise ValueError(f"with its aliases it has over {_MOST:,} values")
        if level > _DEEPEST:
            raise ValueError(_TOO_DEEP)
        if isinstance(node, yaml.MappingNode):
            _check_keys(node)
            nodes += [(value, level + 1) for _, value in node.value]
        elif isinstance(node, yaml.SequenceNode):
            nodes += [(value, level + 1) for value in node.value]
        elif isinstance(node, yaml.ScalarNode) and node.tag in _NUMBERS and _NO_DECIMAL.fullmatch(node.value):
            # seed: 010 -> "010", so that it is not 8; `--seed 010` comes here as well
            node.tag = _TEXT


def _check_keys(mapping: yaml.MappingNode) -> None:
    """Make each key text, as `on` would be true; YAML would take the last value of a key that is there twice."""
    lines: dict[str, int] = {}
    for key, _ in mapping.value:
        if key.tag == _MERGE:  # `<<: *rates`: all that are merged count
            continue
        name, line = str(key.value), key.start_mark.line + 1
        if name in lines:
            raise ValueError(f"{name} is in lines {lines[name]} and {line}; write it once")
        lines[name] = line
        if isinstance(key, yaml.ScalarNode):  # else `{[a]: 1}`, which PyYAML refuses
            key.tag = _TEXT
