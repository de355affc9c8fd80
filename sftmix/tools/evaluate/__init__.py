"""Benchmarks on the models of a run, by lm-eval, in one table with standard errors.

    harness  finished models as lm-eval asks them, and their scores, one file for each task, model and settings
    table    tasks x models, and their differences

Nothing else in the package imports this room, but the command line, cards and reports. It needs the extra `eval`
(lm-eval).
"""
