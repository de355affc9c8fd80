"""Models and scores of a run, shared with others: model cards, and the hub.

    facts   the files of a run -> what a card says of it
    text    Markdown whose words from data cannot become markup
    cards   the card of a model, and that of shared scores
    scores  the scores of a data set without its text, as files
    hub     an upload

Nothing else in the package imports this room, but the command line.
"""
