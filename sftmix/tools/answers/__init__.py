"""Answers of finished models: in a terminal, and in files for people and for official judges.

Nothing else in the package imports this room, but the command line.
"""
