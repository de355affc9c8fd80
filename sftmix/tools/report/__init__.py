"""A page about what the method saw in the data, and one table of all examples, from the files of a finished run.

    run       the files of a run, read back
    look      forward passes over a few examples: hidden states, and the NLL of each token
    examples  one table of examples: report/examples.parquet
    mixed     the first pairs that the training mixed, token beside token
    pictures  plotly figures of runs
    text      figures as tables and sentences
    page      all of it in one HTML file
    write     the pages of one run, of several runs, and of a table

Nothing else in the package imports this room. It needs the extra `report` (plotly and scikit-learn).
"""
