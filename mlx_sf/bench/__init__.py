"""Measurements: whole runs, as ratios against a peer in the same process and against the machine's product rate."""
