"""What jsonargparse says about a wrong option, said again for people: the key, the value, what is allowed, the nearest.

A message that matches nothing here is passed on as it is, on one line.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

from sftmix.config.parser import (
    component_bases,
    component_classes,
    component_options,
    import_class,
    known_components,
    option_groups,
    option_hints,
)

_WORDS = {
    "<class 'int'>": "a whole number",
    "<class 'float'>": "a number",
    "<class 'str'>": "text",
    "<class 'bool'>": "true or false",
    "<class 'list'>": "a list [a, b]",
    "<class 'NoneType'>": "null",
}


def nearest(word: str, allowed: Iterable[str]) -> str:
    """` Did you mean X?` for the closest allowed word, or nothing."""
    close = difflib.get_close_matches(word, list(allowed), n=1, cutoff=0.5)
    return f" Did you mean {close[0]}?" if close else ""


def unknown_option(key: str, allowed: Iterable[str]) -> str:
    """Message for an option that does not exist, where `allowed` are full keys (`training.epochs`)."""
    allowed = list(allowed)
    prefix = key.partition(".")[0] + "." if "." in key else ""
    siblings = [k for k in allowed if k.startswith(prefix)] if prefix else []
    listed = f"; there are {', '.join(siblings)}" if siblings else ""
    last = {k.rpartition(".")[2]: k for k in allowed}
    guess = nearest(key, siblings) or nearest(key, allowed) or nearest(key.rpartition(".")[2], last)
    return f"unknown option {key}{listed}.{guess or ' --help lists them all.'}"


def unknown_class(key: str, value: str, reason: str = "") -> str:
    """Message for a class that is not there, or is not of the kind that the option takes."""
    names = list(known_components(component_bases()[key]))
    extra = ["auto", "null"] if key == "pairing" else []
    reason = f" ({reason})" if reason else ""
    return (
        f"{key}: no {component_bases()[key].__name__} {value!r}{reason}; there are {', '.join(names + extra)}, "
        f"or the import path of your own class (my_module.MyClass).{nearest(value.rpartition('.')[2], names + extra)}"
    )


def _wrong_value(key: str, message: str) -> str | None:
    expected = re.findall(r"Expected an? (.+?)(?:\. Got value|$)", message, re.M)
    value = re.search(r"(?:Got value|Given value): (?!NestedArg)(.*)", message)
    if not expected or not value:
        return None
    choices = [c for e in expected for c in re.findall(r"'([^']*)'", e) if "Literal" in e]
    words = [_WORDS.get(e, e) for e in expected if "Literal" not in e and "typing" not in e]
    allowed = list(dict.fromkeys([*choices, *words]))
    return f"{key}: {value[1]!r} is not allowed; allowed: {', '.join(allowed)}.{nearest(value[1], choices)}"


def _component_problem(key: str, message: str) -> str | None:
    """The messages about a chosen class and its arguments; `key` is the full key, its first part the field."""
    field = key.partition(".")[0]
    classes = re.findall(r"Problem with given class_path '([^']+)'", message)
    unknown = re.search(r"Option '([^']+)' is not accepted", message)
    if unknown and classes:
        names = list(component_options(import_class(classes[-1])))
        takes = f"it takes {', '.join(names)}" if names else "it takes none"
        name = classes[-1].rpartition(".")[2]
        return f"{key}.{unknown[1]}: {name} has no option {unknown[1]!r}; {takes}.{nearest(unknown[1], names)}"
    if field not in component_bases():
        return None
    if key == field and re.search(r"Not a valid subclass of \w+\. Got value: None", message):
        listed = ", ".join(known_components(component_bases()[key]))
        return f"{key} is null; it takes one of {listed}, or an import path"
    if missing := re.search(r"following arguments are required: (.+)", message):
        keys = ", ".join(f"{key}.{name.strip()}" for name in missing[1].split(","))
        return f"{key}: {classes[-1].rpartition('.')[2]} needs {keys}"
    if classes and key != field and (nested := _no_nested_component(key, message, classes[0])):
        return nested
    if name := re.search(r"Expected a dot import path string: (\S+)", message):
        return unknown_class(field, name[1])
    if path := re.search(r"Import path (\S+) does not correspond to a subclass", message):
        return unknown_class(field, path[1], "it is of another kind")
    if abstract := re.search(r"but (\S+) is abstract", message):
        return unknown_class(field, abstract[1], "it is abstract: a method is missing")
    if absent := re.search(r"(?:[Mm]odule '\S+' has no attribute|No module named) .*", message):
        return unknown_class(field, classes[-1] if classes else "", absent[0].strip())
    return None


def _no_nested_component(key: str, message: str, holder: str) -> str | None:
    """The message for an option of a component, itself a number or a component (`objective.mu`), that is neither."""
    option = component_options(import_class(holder)).get(key.partition(".")[2])
    bases = component_classes(option.annotation) if option else []
    value = re.search(r"Given value: (.*)", message)
    if not bases or not value:
        return None
    names = list(known_components(bases[0]))
    listed = f"{', '.join(names)}, or an import path"
    if value[1].startswith("NestedArg"):
        return f"{key} is no {bases[0].__name__} that has options; choose one first, --{key} CLASS: {listed}"
    words = " or ".join(["a number", f"a {bases[0].__name__}"])
    return f"{key}: {value[1]!r} is not {words}; there are {listed}.{nearest(value[1], names)}"


def explain(message: str) -> str:
    """One message for people from one of jsonargparse."""
    key = ".".join(re.findall(r'Parser key "([^"]+)"', message))
    if group := re.search(r"Group '([^']+)' does not accept option '([^']+)'", message):
        return unknown_option(f"{group[1]}.{group[2]}", option_hints())
    if not key and (option := re.search(r"^Option '([^']+)' is not accepted", message)):
        return unknown_option(option[1], [*option_hints(), *option_groups()])
    if key:
        found = _component_problem(key, message) or _wrong_value(key, message)
        if found:
            return found
    if message.startswith("Unexpected config"):
        return "not a configuration: expected `option: value` lines"
    return " ".join(message.split())
