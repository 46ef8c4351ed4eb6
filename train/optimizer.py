"""Adam for scenes: one fused pass a parameter, optionally only over the rows that were drawn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from prismfield.render.ops.adam import adam_step


class FusedAdam(torch.optim.Optimizer):
    """Adam (arXiv:1412.6980) whose groups hold one named parameter each.

    `state[parameter]` has `exp_avg`, `exp_avg_sq` (shaped like the parameter) and `step` (an int); strategies that add or
    drop rows change the two tensors together with the parameter. A parameter without a gradient is left alone. Where a group
    has `row_rates`, a function that returns [N], each row's learning rate is that many times `lr`.
    """

    def __init__(
        self, groups: list[dict[str, Any]], *, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-15
    ) -> None:
        super().__init__(groups, {"lr": 1e-3, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None, *, rows: Tensor | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient.

        Args:
            closure: not supported; must be None.
            rows: [N] bool: update only these rows of the parameters with N of them (sparse Adam).
        """
        if closure is not None:
            raise ValueError("closure: expected None; compute the gradients before the step")
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state |= {
                        "step": 0,
                        "exp_avg": torch.zeros_like(parameter, memory_format=torch.contiguous_format),
                        "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.contiguous_format),
                    }
                state["step"] += 1
                rated = (parameter.clone(), group["row_rates"]()) if "row_rates" in group else None
                adam_step(
                    parameter,
                    parameter.grad,
                    state["exp_avg"],
                    state["exp_avg_sq"],
                    lr=group["lr"],
                    betas=group["betas"],
                    eps=group["eps"],
                    step=state["step"],
                    rows=rows
                    if rows is not None and len(rows) == len(parameter) and group.get("sparse", True)
                    else None,
                )
                if rated is not None:
                    before, rates = rated
                    parameter.sub_(before).mul_(rates.view(-1, *[1] * (parameter.dim() - 1))).add_(before)

    def tensors(self) -> dict[str, Tensor]:
        """The moments by name ("means.exp_avg", ...), for a checkpoint."""
        return {
            f"{group['name']}.{key}": value
            for group in self.param_groups
            for key, value in self.state[group["params"][0]].items()
            if isinstance(value, Tensor)
        }

    def counts(self) -> dict[str, int]:
        """Updates that each parameter has had."""
        return {group["name"]: self.state[group["params"][0]].get("step", 0) for group in self.param_groups}

    def restore(self, tensors: dict[str, Tensor], counts: dict[str, int]) -> None:
        """Take up what `tensors` and `counts` gave."""
        for group in self.param_groups:
            name, parameter = group["name"], group["params"][0]
            if not counts.get(name):
                continue
            state = {key: tensors[f"{name}.{key}"].to(parameter.device).clone() for key in ("exp_avg", "exp_avg_sq")}
            for key, value in state.items():
                if value.shape != parameter.shape:
                    raise ValueError(f"{name}.{key}: expected {list(parameter.shape)}, got {list(value.shape)}")
            self.state[parameter] = state | {"step": counts[name]}
