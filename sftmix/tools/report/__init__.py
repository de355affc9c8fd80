"""A page about what the method saw in the data, and one table of all examples, from the files of a finished run.

    run        the files of a run, read back
    look       forward passes over a few examples: hidden states, and the NLL of each token
    examples   one table of examples: report/examples.parquet
    ends       both ends of the confidence: a map of hidden states (t-SNE), and topics
    tokens     responses token by token, alone and in pairs
    benchmarks the table of `sftmix evaluate`, if there is one
    figures    plotly figures of one run; several: of several runs
    sentences  what happened, in sentences
    page       all of it in one HTML file

Nothing else in the package imports this room. It needs the extra `report` (plotly and scikit-learn).
"""
