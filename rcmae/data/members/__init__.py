"""What a sample has beside its image and label (a map, an annotation), and how it is read."""
