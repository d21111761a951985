"""The optimizer of both trainings: Muon for weight matrices, AdamW for everything else, and an average of the weights.

Muon (Keller Jordan et al.) replaces a matrix's momentum by the nearest orthogonal one. On a few CPU minutes it gets
visibly further than AdamW alone. Matrices of one shape are handled as one batch, which keeps its cost small.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """Push the singular values of a batch of matrices (n, rows, columns) towards 1, keeping singular vectors.

    In bfloat16, which is plenty for a direction and twice as fast. By hand: torch.optim.Muon (2.9 and newer) takes no
    convolution kernels and goes through one matrix after another.
    """
    a, b, c = NEWTON_SCHULZ
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.transpose(1, 2) if tall else matrices
    x = (x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)).bfloat16()
    for _ in range(steps):
        gram = x @ x.transpose(1, 2)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.transpose(1, 2) if tall else x).float()


class Muon(torch.optim.Optimizer):
    """Orthogonalized momentum for matrices and convolution kernels (taken as rows of flattened filters)."""

    def __init__(self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            by_shape: dict[tuple[int, int], list[nn.Parameter]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    by_shape[(p.shape[0], p[0].numel())].append(p)
            for (rows, columns), params in by_shape.items():
                updates = orthogonalize(torch.stack([self._momentum(p, group["momentum"]) for p in params]))
                # this scale gives an update the root mean square of AdamW's, so one learning rate suits both
                scale = 0.2 * max(rows, columns) ** 0.5
                for p, update in zip(params, updates, strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(update.view_as(p), alpha=-group["lr"] * scale)

    def _momentum(self, p: nn.Parameter, momentum: float) -> Tensor:
        buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
        buffer.lerp_(p.grad, 1 - momentum)
        return p.grad.lerp(buffer, momentum).flatten(1)


class Optimizers:
    """Muon for hidden matrices and AdamW for the rest, driven by one learning rate factor."""

    def __init__(
        self, module: nn.Module, muon_lr: float, adam_lr: float, adam_names: tuple[str, ...], decay: float = 0.0
    ):
        """Parameters with fewer than two axes, or whose name holds one of adam_names, go to AdamW."""
        named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        adam = [p for name, p in named if p.ndim < 2 or any(part in name for part in adam_names)]
        chosen = {id(p) for p in adam}
        muon = [p for _, p in named if id(p) not in chosen]
        self.parts = [
            (Muon(muon, lr=muon_lr, weight_decay=decay), muon_lr),
            (torch.optim.AdamW(adam, lr=adam_lr, betas=(0.9, 0.98), weight_decay=0.0), adam_lr),
        ]

    def step(self, factor: float) -> None:
        """One update at factor times the full learning rates, then clear the gradients."""
        for optimizer, lr in self.parts:
            for group in optimizer.param_groups:
                group["lr"] = lr * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> list[dict]:
        return [optimizer.state_dict() for optimizer, _ in self.parts]

    def load_state_dict(self, states: list[dict]) -> None:
        for (optimizer, _), state in zip(self.parts, states, strict=True):
            optimizer.load_state_dict(state)


def learning_rate_factor(step: int, done: float, warmup: int) -> float:
    """Linear warmup to 1 over the first steps, and linear decay to 0 as the budget's spent share goes to 1."""
    return min((step + 1) / warmup, 1.0) * (1.0 - done)


class Average:
    """Exponential moving average of a module's parameters, short at the start so that early values wash out.

    By hand: the state of `swa_utils.AveragedModel` has other names, so no run that was saved before could be resumed.
    """

    def __init__(self, module: nn.Module, decay: float):
        self.decay = decay
        self.values = {name: p.detach().clone() for name, p in module.named_parameters()}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        decay = min(self.decay, (step + 1) / (step + 10))
        names = list(self.values)
        parameters = dict(module.named_parameters())
        torch._foreach_lerp_([self.values[n] for n in names], [parameters[n] for n in names], 1 - decay)

    def load(self, values: dict[str, Tensor]) -> None:
        """Resume from saved values, on whatever device the module is."""
        for name, value in values.items():
            self.values[name].copy_(value)

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        for name, p in module.named_parameters():
            p.copy_(self.values[name])
