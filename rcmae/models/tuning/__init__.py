"""Ways to compute the same blocks faster: compiled, and by the attention kernel that a GPU is
fastest with."""
