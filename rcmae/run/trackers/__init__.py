"""A run in Weights & Biases, MLflow or trackio: its committed steps, each once, over any kill."""
