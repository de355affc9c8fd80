"""Models and scores of a run, for others: model cards, and what is put on the hub.

    cards    the files of a run -> the card of a model, and the scores of a data set without its text, with their card
    command  `export`, and the cards that other commands leave behind

Nothing else in the package imports this room, but the command line; model.md and scores.md are the text of the cards.
"""
