"""A certificate that a result is what its configuration says: some steps of a run are made again and compared.

    window       which steps, from which checkpoint; refused before torch is imported
    run          the stages, made again by the recipe's own functions in a copy of the run directory; what counts as the
                 same as what the run wrote; and the certificate

It reads a run and writes nothing into it. Nothing else in the package imports this room, but the command line.
"""
