"""A model's passport: a folder with weights that timm and transformers load without a network, and
all that a stranger must know of them.
"""
