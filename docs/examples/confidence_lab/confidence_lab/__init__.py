"""Components for SFTMix, chosen by import path."""
