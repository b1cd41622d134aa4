"""From noise to pictures: the time grid, solvers, guidance, requests, outputs."""
