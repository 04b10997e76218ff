"""Training methods: what a method adds to the trainer is its network, the views it makes of a batch, and its losses."""
