"""A row and a tokenizer -> conversation, token ids, and a mask of the response tokens.

`make_encoder` chooses the chat template. Nothing here reads or stores rows, or needs torch.
"""

from sftmix.text.chat_template import ChatTemplate
from sftmix.text.encoder import Encoder, encoder_for, make_encoder

__all__ = ["ChatTemplate", "Encoder", "encoder_for", "make_encoder"]
