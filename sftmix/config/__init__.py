"""The configuration of a run: the typed tree of its options, reading it from files, and checking it.

run_config  RunConfig, the tree: options and components with the paper's defaults
schema      what can be set: options with types and defaults, components by short name or import path
load        YAML text -> plain values, without what YAML 1.1 makes of some numbers and keys
values      a plain value or a word -> a value of an option's type, or the message that says why not
merge       layers of plain values over each other, and the tree that they make
wants       which stages a configuration makes, and what they hold
read        files, recipes and their bases, runs of others, plain values -> RunConfig
checks      `validate`: values, and options against each other
"""

from sftmix.config.run_config import RunConfig

__all__ = ["RunConfig"]
