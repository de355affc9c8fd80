"""Benchmarks on the models of a run, by lm-eval, in one table with standard errors.

    convert   raw files of MedQA, PubMedQA and MedMCQA -> rows that the tasks of this room read
    raw       those files, read as rows with their places
    tasks/    the task files of this room, for lm-eval
    chosen    names of tasks -> what lm-eval loads
    harness   one task on one model, by lm-eval
    entries   results on disk, one file for each task, model and settings
    table     tasks x models, and differences between models on the same questions
    run       all of it

Nothing else in the package imports this room, but the command line. It needs the extra `eval` (lm-eval).
"""
