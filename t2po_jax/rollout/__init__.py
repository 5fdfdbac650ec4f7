"""Acting: the sampler on the device, the environments on the host."""
