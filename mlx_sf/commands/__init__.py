"""The subcommands of `mlx-sf`: one module each, parsing and printing only."""
