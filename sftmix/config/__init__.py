"""What decides a run: its typed tree of options, where it is read from, and what is checked before any work.

run_config  RunConfig, the tree: options and components with the paper's defaults
schema      the options that the tree has, by name, with their types
layers      configuration files, recipes, and the files that they are made from
read        plain values and files -> RunConfig
messages    what is said of a name or a value that does not fit
checks      options against each other: `validate`
text        what plain text asks of the rest
"""

from sftmix.config.run_config import RunConfig

__all__ = ["RunConfig"]
