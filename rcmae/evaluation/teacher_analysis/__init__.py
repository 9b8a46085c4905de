"""What the teacher does to a run's gradients: RC-MAE's analysis (Lee et al., ICLR 2023, section 3)
of a run of yours.

At each checkpoint that the run has kept (checkpoint.keep_every), in float64, the total and each
layer's:

1. the gradient of the reconstruction and of the consistency at the batch that comes next: cosine
   and ratio of norms;
2. what the run's own teacher pulls at: the cosine of the consistency's gradient with the way that
   the student has gone from the teacher, and with the reconstruction's gradient at the last batch;
   at that batch, at it under other masks, at other images;
3. the conditional momentum: from student = teacher one small step is taken along one image's
   gradient. What share of it would the consistency take back at the same image and mask, under
   another mask, at other images? Against how alike the encoder's features are.

And 4., the paper's linear model (`linear`): one matrix on masked images, where the consistency's
gradient is by algebra the sum of all earlier gradients, each times a power of the momentum,
projected on the input.

Not done: the optimizer's scaling; steps are those of plain gradient descent, as in the paper's
argument."""
