"""What a run trains and how it is judged: pretraining, fine-tuning, probing, or your own."""
