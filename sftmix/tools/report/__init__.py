"""A page about what the method saw in the data, and one table of all examples, from the files of a finished run.

    run       the files of a run, read back
    look      forward passes over some examples: their NLL, and their last hidden states
    examples  one table of examples: report/examples.parquet
    mixed     the first pairs that the training mixed, token beside token
    pictures  plotly figures of runs
    page      all of it in one HTML file
    write     the pages of one run and of several runs, with their figures as tables and sentences

Nothing else in the package imports this room. It needs the extra `report` (plotly and scikit-learn).
"""
