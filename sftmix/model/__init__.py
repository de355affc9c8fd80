"""Hugging Face models: loading, export, and the details that the loss and the loop need."""
