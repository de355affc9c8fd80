"""What comes from elsewhere: other papers' methods, places of mixing, weights of tokens, servers, 8-bit state.

A run imports two of its modules, for the default callbacks Calibration and Remarks. `sftmix.components` names its
classes beside the shipped ones of the method.
"""
