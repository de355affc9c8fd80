"""Answers of finished models: in a terminal, and in files for people, for official judges and for blind raters.

Nothing else in the package imports this room, but the command line.
"""
