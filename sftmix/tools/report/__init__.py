"""A page about what the method saw in the data, and one table of all examples, from the files of a finished run.

    run        the files of a run, read back; NLL and hidden states of its examples under its models
    examples   one table of examples: report/examples.parquet
    axes       ticks of logarithms, and values far from all others
    pictures   plotly figures of runs
    write      the page of a run, or of a table
    page.html  their sections, titles, captions and sentences

Nothing else in the package imports this room. It needs the extra `report` (plotly and scikit-learn).
"""
