"""Shards made, indexed, verified and repaired: what comes before a training."""
