"""What comes from elsewhere: other papers' methods, places of mixing, weights of tokens, servers, 8-bit state.

The core imports none of it; `sftmix.components` names its classes beside the shipped ones of the method.
"""
