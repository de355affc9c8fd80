"""The components of docs/examples, as a user imports them: from a directory of their own."""

import importlib
import sys

from sftmix.components import catalogue
from tests.tiny import ROOT

catalogue()  # as a command does: the shipped classes are there first
EXAMPLES = str(ROOT / "docs" / "examples")

sys.path.insert(0, EXAMPLES)
ByConfidence = importlib.import_module("curriculum").ByConfidence
LossSpikeGuard = importlib.import_module("loss_spikes").LossSpikeGuard
Packed = importlib.import_module("packing").Packed
Shares = importlib.import_module("shares").Shares
TailSFT = importlib.import_module("tail_sft").TailSFT
sys.path.remove(EXAMPLES)
