"""Weights in files: of runs and of every published family."""
