"""Muon for the hidden matrices and AdamW for everything else, as one optimizer."""

import torch
from torch import nn


# Quintic Newton-Schulz iteration of https://kellerjordan.github.io/posts/muon: drives all singular values near 1.
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5


def orthogonalize(matrices: torch.Tensor) -> torch.Tensor:
    """Replace each matrix of `(N, rows, columns)` by its nearest (semi-)orthogonal one, approximately.

    Computed in bfloat16 on accelerators and in float32 on the CPU, where bfloat16 is emulated and slow.
    """
    a, b, c = _COEFFICIENTS
    x = matrices.to(torch.float32 if matrices.device.type == "cpu" else torch.bfloat16)
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(matrices.dtype)


class MuonWithAdamW(torch.optim.Optimizer):
    """One optimizer of two rules, chosen by each parameter group's `use_muon`.

    `torch.optim.Muon` accepts matrices alone, and a `Trainer` has one optimizer; this class holds both, steps matrices
    of the same shape together, and follows `match_rms_adamw`: an update has the root mean square of AdamW's (0.2), so
    that learning rates are of AdamW's scale.

    Args:
        params (`list[dict]`): Parameter groups, each with a boolean `use_muon`; Muon groups hold matrices only.
        lr (`float`): Learning rate of groups that name none.
        momentum (`float`): Nesterov momentum of the Muon groups.
        betas, eps: As in AdamW, for the other groups.
        weight_decay (`float`): Decoupled weight decay of groups that name none.

    Raises:
        ValueError: If a Muon group holds something else than matrices.
    """

    def __init__(
        self,
        params: list[dict],
        lr: float = 1e-3,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ):
        defaults = {"lr": lr, "momentum": momentum, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults | {"use_muon": False})
        for group in self.param_groups:
            shapes = [tuple(p.shape) for p in group["params"] if p.ndim != 2]
            if group["use_muon"] and shapes:
                raise ValueError(
                    f"A group with `use_muon` must hold matrices only (got the shapes {shapes}). "
                    "Put other parameters into a group without it."
                )

    @torch.no_grad()
    def step(self, closure=None):
        """Take one step; see [`torch.optim.Optimizer.step`]."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if group["use_muon"]:
                self._muon_step(group, params)
            else:
                self._adamw_step(group, params)
        return loss

    def _muon_step(self, group: dict, params: list[nn.Parameter]) -> None:
        by_shape: dict[tuple, list[nn.Parameter]] = {}
        for p in params:
            by_shape.setdefault((p.shape, p.dtype, p.device), []).append(p)
        for (shape, _, _), same in by_shape.items():
            momenta = [self._momentum(p) for p in same]
            torch._foreach_lerp_(momenta, [p.grad for p in same], 1 - group["momentum"])
            nesterov = torch.stack(torch._foreach_lerp([p.grad for p in same], momenta, group["momentum"]))
            updates = orthogonalize(nesterov)  # (N, rows, columns)
            torch._foreach_mul_(same, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(same, list(updates.unbind()), alpha=-group["lr"] * 0.2 * max(shape) ** 0.5)

    def _momentum(self, p: nn.Parameter) -> torch.Tensor:
        if "momentum" not in self.state[p]:
            self.state[p]["momentum"] = torch.zeros_like(p)
        return self.state[p]["momentum"]

    def _adamw_step(self, group: dict, params: list[nn.Parameter]) -> None:
        beta1, beta2 = group["betas"]
        for p in params:
            state = self.state[p]
            if not state:
                state.update(
                    step=torch.tensor(0.0, dtype=torch.float32, device="cpu"),
                    mean=torch.zeros_like(p),
                    square=torch.zeros_like(p),
                )
            state["step"] += 1
            state["mean"].lerp_(p.grad, 1 - beta1)
            state["square"].mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
            step = state["step"].item()
            scale = (state["square"] / (1 - beta2**step)).sqrt_().add_(group["eps"])
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.addcdiv_(state["mean"], scale, value=-group["lr"] / (1 - beta1**step))


def split_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Trainable parameters as `(hidden matrices, all others)`; embeddings and the head are among the others."""
    outer = {id(p) for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m for p in m.parameters()}
    trainable = [p for p in model.parameters() if p.requires_grad]
    hidden = [p for p in trainable if p.ndim == 2 and id(p) not in outer]
    chosen = {id(p) for p in hidden}
    return hidden, [p for p in trainable if id(p) not in chosen]
