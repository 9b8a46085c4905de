"""Commands that train steps of a run again."""
