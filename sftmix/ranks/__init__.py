"""What several ranks need: their world and its launcher, tensors for a device, the same random numbers everywhere."""
