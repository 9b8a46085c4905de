"""Commands that tell what a trained network knows, and how it came to know it."""
