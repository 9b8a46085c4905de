"""Networks and the kernels that they compute with."""
