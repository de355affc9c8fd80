"""The configuration of a run: the typed tree of its options, reading it from files, and checking it.

run_config  RunConfig, the tree: options and components with the paper's defaults
schema      all options of the tree by name, with their types
layers      configuration files and recipes, and their bases
nested      the options of a layer as nested mappings, however they were written
read        plain values and files -> RunConfig
messages    errors about a name or a value that does not fit
inherited   the training options of a reference, from its own and the run's
checks      `validate`: values, and options against each other
"""

from sftmix.config.run_config import RunConfig

__all__ = ["RunConfig"]
