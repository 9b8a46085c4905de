"""Steps of a run, trained again on one process: a bad one with its samples, or the first ones."""
