"""Answers of finished models: to a file of prompts, in the formats of official judges, and in a terminal.

Nothing but the command line imports this room.
"""
