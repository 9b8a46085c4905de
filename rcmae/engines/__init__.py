"""What moves the weights: one process, DeepSpeed, FSDP2; optimizers, schedules, the teacher."""
