"""Hugging Face models, in and out: what the loss and the loop have to know of them."""

from __future__ import annotations
