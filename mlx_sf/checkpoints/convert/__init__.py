"""Foreign checkpoints become mlx-sf's own; one file per network and layout knows its keys."""
