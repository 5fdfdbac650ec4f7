"""Acting: the sampler on the device, environments on the host."""
