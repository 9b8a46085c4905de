"""A process among others: who started it, how it meets its peers, what it may use, what it waits
for, and output that is never a reason to stop."""
