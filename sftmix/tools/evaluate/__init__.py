"""Benchmarks on the models of a run, by lm-eval, in one table with standard errors.

    convert   raw files of MedQA, PubMedQA and MedMCQA -> rows that the tasks of this room read
    tasks/    the task file of this room, for lm-eval
    command   finished models as lm-eval asks them, and their scores, one file for each task, model and settings;
              tasks x models, and their differences

Nothing else in the package imports this room, but the command line. It needs the extra `eval` (lm-eval).
"""
