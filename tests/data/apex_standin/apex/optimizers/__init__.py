"""Stand-in: apex.optimizers.FusedAdam, which counts steps by group."""

import torch


class FusedAdam(torch.optim.Optimizer):
    def __init__(
        self,
        params,
        lr=1e-3,
        bias_correction=True,
        betas=(0.9, 0.999),
        eps=1e-8,
        adam_w_mode=True,
        weight_decay=0.0,
        amsgrad=False,
        set_grad_none=True,
    ):
        assert (adam_w_mode, bias_correction, amsgrad) == (True, True, False)
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            one, two = group["betas"]
            for param in group["params"]:
                state = self.state[param]
                for key in ("exp_avg", "exp_avg_sq"):
                    state.setdefault(key, torch.zeros_like(param))
                state["exp_avg"].lerp_(param.grad, 1 - one)
                state["exp_avg_sq"].mul_(two).addcmul_(param.grad, param.grad, value=1 - two)
                mean = state["exp_avg"] / (1 - one ** group["step"])
                scale = (state["exp_avg_sq"] / (1 - two ** group["step"])).sqrt() + group["eps"]
                param.mul_(1 - group["lr"] * group["weight_decay"]).addcdiv_(
                    mean, scale, value=-group["lr"]
                )
