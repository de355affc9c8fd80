"""`components`: what can be swapped, and the options of one component."""

import argparse
import inspect
import re
from dataclasses import KW_ONLY, dataclass
from importlib.util import find_spec

from sftmix.cli.help import formatted, option_rows
from sftmix.components.base import Objective, Schedule
from sftmix.components.component import Component
from sftmix.components.listing import Shipped, as_shipped, catalogue
from sftmix.components.renderer import Renderer
from sftmix.components.row_format import RowFormat
from sftmix.config.schema import chosen_by, component_bases, find_component, import_class
from sftmix.tools.runs.output import rendered
from sftmix.words.errors import ConfigError, ContractError

ABOUT = """List the components that can be swapped, one line each by the option that chooses them.
With a name, show one with its options.

  sftmix components
  sftmix components SFTMix
  sftmix components my.Pairs --check      does it keep the contract of its kind?"""


NESTED: dict[str, type[Component]] = {"objective.mu": Schedule}
"""Option -> base class of the components that only options of shipped components take."""


@dataclass
class Options:
    name: str | None = None
    """NAME: a component, or a kind of them"""
    _: KW_ONLY
    check: bool = False
    """run the checks of sftmix.testing on it, with its defaults"""
    finite_differences: bool | None = None
    """with --check of an objective: false if its loss has detached parts, whose gradient they would not find"""


def main(args: Options) -> None:
    """Print every component under the option that chooses it, one line each; or one with its docstring and options.

    A short name that several components have shows all of them.
    """
    places, shipped = component_bases() | NESTED, dict(catalogue())
    if args.check and not args.name:
        raise ConfigError("--check is for one component: name it, as in `sftmix components my.Pairs --check`")
    kinds = {option: base for option, base in places.items() if base.__name__ == args.name}  # RowFormat
    if not args.name or (kinds and not args.check):
        print(rendered("listing/catalogue.txt", places=kinds or places, shipped=shipped, as_shipped=as_shipped))
    else:
        _show(args, places, shipped)


def _show(args: Options, places: dict[str, type[Component]], shipped: dict[str, list[Shipped]]) -> None:
    """Print the components of a name, and the outcome of their checks."""
    named = [import_class(one.path) for every in shipped.values() for one in every if one.name == args.name]
    more = {} if args.finite_differences is None else {"finite_differences": args.finite_differences}
    for cls in named or [find_component(Component, args.name or "")]:  # FromFile is three, my.Pairs one
        for option, base in places.items():
            if issubclass(cls, base):  # a class may be of several kinds
                if more and not (args.check and base is Objective):
                    raise ConfigError("--finite_differences is for --check of an objective; leave it out")
                title = f"{cls.__name__}  ({as_shipped(cls).path}), chosen by --{option} {chosen_by(cls)}"
                about = f"{title}\n\n{inspect.getdoc(cls) or ''}"
                rows = option_rows(cls, f"{option}.")
                print(formatted("options", rows, usage=argparse.SUPPRESS, description=about))
                if args.check:
                    print(check_component(cls, base, **more))


def check_component(cls: type[Component], base: type[Component], **more: bool) -> str:
    """Run the check of a base class on a component with its defaults; raise ContractError for what it does not keep.

    more  what the check takes beside the component
    """
    if not find_spec("hypothesis"):
        raise ConfigError("--check needs hypothesis, which is not installed: pip install -e '.[test]' in the checkout")
    from sftmix import testing

    kind = re.sub(r"(?<!^)(?=[A-Z])", "_", base.__name__).lower()  # PairSampler -> pair_sampler
    if base in (RowFormat, Renderer):
        raise ConfigError(f"--check has no rows for a {base.__name__}: call sftmix.testing.check_{kind} with some")
    try:
        component = cls()
    except TypeError as error:
        raise ConfigError(
            f"--check makes {cls.__name__} with its defaults, and not all options have one: {error}"
        ) from error
    try:
        getattr(testing, f"check_{kind}")(component, **more)
    except AssertionError as error:
        raise ContractError(f"{cls.__name__}: {error}") from error
    return f"{cls.__name__} keeps the contract of {base.__name__} (sftmix.testing.check_{kind})"
