"""The configuration of a run: the typed tree of its options, reading it from files, and checking it.

run_config  RunConfig, the tree: options and components with the paper's defaults
schema      the options of the tree and of components, with types and defaults
classes     components by short name or import path, and where those of the user's own are looked for
layers      configuration files and recipes, and their bases
values      a plain value or a word -> a value of an option's type, or the message that says why not
merge       layers of plain values over each other, and the tree that they make
read        files, runs of others and plain values -> RunConfig
checks      `validate`: values, and options against each other
"""

from sftmix.config.run_config import RunConfig

__all__ = ["RunConfig"]
