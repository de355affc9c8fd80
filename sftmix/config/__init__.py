"""The configuration of a run: the typed tree of its options, reading it from files, and checking it.

run_config  RunConfig, the tree: options and components with the paper's defaults
schema      the types of all options, of the tree's by name and of components
own_modules the working directory as a place of classes that options name
classes     components by short name or import path
layers      configuration files and recipes, and their bases
values      a plain value or a word -> a value of an option's type
merge       layers of plain values over each other, and the tree that they make
read        files, runs of others and plain values -> RunConfig
messages    errors about a name or a value that does not fit
inherited   the training options of a reference, from its own and the run's
checks      `validate`: values, and options against each other
"""

from sftmix.config.run_config import RunConfig

__all__ = ["RunConfig"]
