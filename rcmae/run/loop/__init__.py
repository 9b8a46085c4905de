"""The parts that the training loop works with, in the order in which `fit` calls them: batches,
agreement, schedule, recovery, recording, evaluation, saving; progress counts the steps and meter
their seconds."""
