"""How good features are without labels: their spectra, and the loss on images that are held out."""
