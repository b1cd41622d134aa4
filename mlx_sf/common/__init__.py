"""Helpers that know nothing of networks: files, progress, processes, fields, pixels, figures, text."""
