"""A run, or several beside each other, on one page that opens anywhere: no network, no script.

`reading` gets it out of the run's folder, `curves` makes panels of numbers, `recipes` says what
differs, `happened` tells events, `page` fills the template. Nothing here imports torch.
"""
