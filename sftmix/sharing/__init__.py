"""Models and scores of a run, shared with others: model cards, and the hub.

    facts   what a run's files say for a card
    cards   cards of models and of scores, as text
    scores  the scores of a data set without its text: written, and read back
    hub     uploads to a hub

Nothing else in the package imports this room, but the command line.
"""
