"""A certificate that a result is what its configuration says: some steps of a run are made again and compared.

    window       which steps, from which checkpoint; refused before torch is imported
    certificate  what was compared and found, as lines and as JSON
    files        the files of a run and the hashes in their manifests
    inputs       the configuration, rows and models and what the stages recorded of them
    split        selection, confidence and groups, made again
    replay       the steps, made again in a directory beside the run
    steps        the log of the replay and that of the run
    weights      two sets of weights
    ends         weights before and after the window, the exported model, and what was measured of it
    run          all of it

It reads a run and writes nothing into it. Nothing else in the package imports this room, but the command line.
"""
