"""How good a network is whose answer is as large as the image."""
