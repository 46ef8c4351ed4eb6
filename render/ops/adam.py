"""One Adam step in a single pass over memory, on all rows or on some."""

import torch
from torch import Tensor

from prismfield.render.kernels import kernels_of, use_kernel


@torch.no_grad()
def adam_step(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    step: int,
    rows: Tensor | None = None,
) -> None:
    """Update `param`, `exp_avg` and `exp_avg_sq` in place (Kingma and Ba, arXiv:1412.6980, algorithm 1).

    Args:
        param: [N, ...], contiguous.
        grad: the same shape.
        exp_avg: first moment, the same shape.
        exp_avg_sq: second moment, the same shape.
        lr: learning rate.
        betas: decay of the two moments, in [0, 1).
        eps: added to the root of the second moment.
        step: 1 for the first; for the bias correction.
        rows: [N] bool; rows that are False keep parameter and moments as they are (sparse Adam).

    Raises:
        ValueError: shapes differ, or a tensor that is written is not contiguous.
    """
    for name, tensor in (("grad", grad), ("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        if tensor.shape != param.shape:
            raise ValueError(f"{name}: expected {list(param.shape)} like param, got {list(tensor.shape)}")
    if rows is not None and rows.shape != param.shape[:1]:
        raise ValueError(f"rows: expected [{param.shape[0]}], got {list(rows.shape)}")
    if not use_kernel(param):
        adam_step_reference(param, grad, exp_avg, exp_avg_sq, lr, betas, eps, step, rows)
        return
    if not (param.is_contiguous() and exp_avg.is_contiguous() and exp_avg_sq.is_contiguous()):
        raise ValueError("param, exp_avg, exp_avg_sq: expected contiguous tensors")
    where = param.new_empty(0, dtype=torch.bool) if rows is None else rows.contiguous()
    width = param[0].numel() if len(param) else 0
    tensors = (param.detach(), grad.contiguous(), exp_avg, exp_avg_sq, where)
    kernels_of(param).adam_step(*tensors, width, lr, betas[0], betas[1], eps, step)
    torch.autograd.graph.increment_version(param)  # the kernel writes unseen; who caches what follows from it must know


def adam_step_reference(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    step: int,
    rows: Tensor | None,
) -> None:
    """`adam_step` in plain PyTorch: the specification."""
    mean = betas[0] * exp_avg + (1 - betas[0]) * grad
    square = betas[1] * exp_avg_sq + (1 - betas[1]) * grad * grad
    change = lr / (1 - betas[0] ** step) * mean / ((square / (1 - betas[1] ** step)).sqrt() + eps)
    changes = torch.ones_like(param, dtype=torch.bool)
    if rows is not None:
        changes &= rows.view(-1, *(1,) * (param.dim() - 1))
    param.copy_(torch.where(changes, param - change, param))
    exp_avg.copy_(torch.where(changes, mean, exp_avg))
    exp_avg_sq.copy_(torch.where(changes, square, exp_avg_sq))
