"""From tars to batches: which samples, in which order, with which crops and masks."""
