"""SFTMix inside trainers of others: transformers' Trainer, TRL's SFTTrainer and axolotl's."""

from sftmix.tools.integrations.dynamics import DynamicsCallback
from sftmix.tools.integrations.trainer import SFTMixArguments, SFTMixTrainer

__all__ = ["DynamicsCallback", "SFTMixArguments", "SFTMixTrainer"]
