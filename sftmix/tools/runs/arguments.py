"""The words of a command that reads no configuration -> its options, an object of the dataclass `Options` there."""

import argparse
import os
import re
from collections.abc import Sequence
from typing import Any, NoReturn

from sftmix.cli.help import option_docs
from sftmix.config.merge import merge
from sftmix.config.schema import alternatives, is_list, options_of
from sftmix.config.values import choices
from sftmix.disk.places import unwritable
from sftmix.words.errors import ConfigError


class WordsParser(argparse.ArgumentParser):
    """An argparse parser that raises ConfigError."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see {self.prog} --help")


def read_words(name: str, command: Any, argv: Sequence[str]) -> Any:
    """Return the options of a command, a module with `Options` and ABOUT; --help ends here.

    Raises ConfigError for places that cannot be written.
    """
    form = argparse.RawDescriptionHelpFormatter
    parser = WordsParser(f"sftmix {name}", description=command.ABOUT, formatter_class=form, allow_abbrev=False)
    add_options(parser, command.Options)
    options = command.Options(**merge({}, vars(parser.parse_args(argv)), options_of(command.Options)))
    for option in {"to", "out"} & vars(options).keys() if name != "track" else ():  # whose --to names a tracker
        if place := getattr(options, option):
            path = os.path.expanduser(place)
            setattr(options, option, path)
            if problem := unwritable(path):
                raise ConfigError(f"--{option}: {place!r} {problem}")
    return options


def add_options(parser: argparse.ArgumentParser, owner: type) -> None:
    """Add the fields of a dataclass to a parser: keywords of its constructor as options, the others as words.

    `group__name` is the option --group.name, and `from_` is --from. The docstring of a field is its help, after the
    form of the value: `FILE: the page`.
    """
    docs = option_docs(owner)
    for name, option in options_of(owner).items():
        # data__roles -> data.roles, from_ -> from.
        key, hint, needed = name.rstrip("_").replace("__", "."), option.annotation, option.default is option.empty
        # "RUN|FILE: a run" has the form RUN|FILE; "auto: as stored" has none, since it is not in capitals.
        form, doc = re.findall(r"(?:([A-Z_|,]+): )?(.*)", docs[name])[0]
        if hint is bool:
            parser.add_argument(f"--{key}", dest=name, action="store_true", help=doc)
            continue
        # Without a form the metavar is the choices: mlflow|swanlab|tensorboard|trackio|wandb.
        value = {"help": doc, "metavar": form or "|".join(choices(hint)) or "VALUE", "default": option.default}
        flag = bool in alternatives(hint)  # as of `run`: --data.skip_bad, or --data.skip_bad true
        count = "+" if is_list(hint) else "?" if flag else None
        if option.kind is option.KEYWORD_ONLY:
            parser.add_argument(f"--{key}", dest=name, required=needed, nargs=count, const=flag or None, **value)
        else:
            # "+": the runs of status; "?": the NAME of components, which has a default.
            parser.add_argument(name, nargs=count if needed else "?", **value)
