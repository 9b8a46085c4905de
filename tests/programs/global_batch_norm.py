"""Run on two ranks: the batch norm of each rank's half against torch's over the whole batch.

Prints one JSON document on rank 0: what -> largest difference over the ranks.
"""

import json

import torch
from torch import nn

from rcmae import dist
from rcmae.models.batchnorm import GlobalBatchNorm

if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.start(required=True)
    ours, theirs = GlobalBatchNorm(4), nn.BatchNorm1d(4)
    found: dict[str, float] = {}
    for step in range(2):
        whole = torch.randn(6, 4, generator=torch.Generator().manual_seed(step)).requires_grad_()
        mine = whole.detach().chunk(2)[dist.rank()].clone().requires_grad_()
        theirs.zero_grad()
        ours.zero_grad()
        want = theirs(whole)
        (want.exp() * torch.arange(6.0)[:, None]).sum().backward()
        got = ours(mine)
        rows = torch.arange(6.0).chunk(2)[dist.rank()][:, None]
        (got.exp() * rows).sum().backward()  # each rank's share of a sum over all rows
        assert whole.grad is not None
        differences = {
            "output": got - want.chunk(2)[dist.rank()],
            "gradient": mine.grad - whole.grad.chunk(2)[dist.rank()],
            "gradient of the weight, summed": dist.all_sum(ours.weight.grad.clone())
            - theirs.weight.grad,
            "running mean": ours.running_mean - theirs.running_mean,
            "running variance": ours.running_var - theirs.running_var,
        }
        for name, difference in differences.items():
            found[name] = max(found.get(name, 0.0), *dist.gather(difference.abs().max().item()))
    if dist.rank() == 0:
        print("RESULT " + json.dumps(found))
    dist.finish()
