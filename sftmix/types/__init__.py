"""Records that travel between the stages, and the shape legend used everywhere.

Legend

    N  examples of the training set        P  pairs of examples (one epoch, or one batch)
    B  slots of a micro-batch (examples)   L  padded length in tokens
    T  token rows of one loss call: the positions that predict a response token
    M  aligned pairs of token rows         D  hidden size
    V  vocabulary size                     C  checkpoints of the reference
    Q  tokens of prompts in a micro-batch

A suffix names the shape: `hidden_TD` is [T, D], `lam_M` is [M].
"""

from sftmix.types.arrays import Bool, Float32, Float64, Int64, Rows, Tensor, TorchOptimizer
from sftmix.types.batch import Batch, BatchNLL, Plan, PromptTokens, Segment
from sftmix.types.rows import Encoded, Example, Message, RenderedTurn
from sftmix.types.scores import (
    MOST_GROUPS,
    NOT_COUNTED,
    OF_TOKENS,
    UNPAIRED,
    UNPAIRED_NAME,
    RowLosses,
    RowScorer,
    Scores,
    Split,
    TrainingDynamics,
)

__all__ = [
    "MOST_GROUPS",
    "NOT_COUNTED",
    "OF_TOKENS",
    "UNPAIRED",
    "UNPAIRED_NAME",
    "Batch",
    "BatchNLL",
    "Bool",
    "Encoded",
    "Example",
    "Float32",
    "Float64",
    "Int64",
    "Message",
    "Plan",
    "PromptTokens",
    "RenderedTurn",
    "RowLosses",
    "RowScorer",
    "Rows",
    "Scores",
    "Segment",
    "Split",
    "Tensor",
    "TorchOptimizer",
    "TrainingDynamics",
]
