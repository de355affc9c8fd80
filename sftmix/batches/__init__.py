"""The examples of each step on each rank, as tensors.

    order    data sets as all of these read them; the global batch of each step
    deal     the ranks and micro-batches of a global batch
    collate  the tensors of one micro-batch

Everything is a pure function of (pairs, lengths, seed, epoch): any rank can work out the work of every rank, and a
resumed run needs only the step number.
"""
