"""Models: how they are opened and proven, passed through and sampled from."""
