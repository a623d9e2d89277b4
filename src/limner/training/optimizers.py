"""The optimizers, with parameter groups; Muon for the matrices of repeated blocks; the learning rate at every step."""

from __future__ import annotations

import contextlib
import importlib
import io
import math
from collections import defaultdict
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from limner.errors import UsageError
from limner.training.sharding import everywhere

if TYPE_CHECKING:
    from limner.training.config import TrainConfig


def lr_at(step: int, config: TrainConfig) -> float:
    """Learning rate of step 0, 1, ...: a linear rise over `warmup` steps, then constant or half a cosine (SGDR,
    arXiv:1608.03983, equation 5) that would reach lr * lr_final at step `steps`."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    if config.lr_schedule == "constant":
        return config.lr
    progress = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.lr * (config.lr_final + (1 - config.lr_final) * (1 + math.cos(math.pi * min(1.0, progress))) / 2)


def parameter_groups(module: nn.Module, parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict]:
    """`parameters` of `module` in two groups: matrices and kernels decay; vectors (biases, norms) and embedding
    tables do not. An empty group is left out."""
    tables = {id(p) for m in module.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    decaying: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for p in parameters:
        (decaying if p.ndim >= 2 and id(p) not in tables else others).append(p)
    groups = [{"params": decaying, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def adamw(module: nn.Module, parameters: Iterable[nn.Parameter], config: TrainConfig) -> torch.optim.AdamW:
    """AdamW (arXiv:1711.05101) over the two groups; fused, so that a step can be withheld on the device."""
    groups = parameter_groups(module, parameters, config.weight_decay)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def adamw8bit(module: nn.Module, parameters: Iterable[nn.Parameter], config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW whose moments are kept in 8 bits (arXiv:2110.02861), those of tensors of less than 4096 numbers in 32."""
    made = packaged("bitsandbytes", "adamw8bit").optim.AdamW8bit
    groups = parameter_groups(module, parameters, config.weight_decay)
    return made(groups, lr=config.lr, betas=config.betas, eps=config.eps)


def adafactor(module: nn.Module, parameters: Iterable[nn.Parameter], config: TrainConfig) -> torch.optim.Optimizer:
    """Adafactor (arXiv:1804.04235): of a matrix's second moment, the means of rows and columns are kept. Its updates
    are `lr` times as long as the weights that they change."""
    groups = parameter_groups(module, parameters, config.weight_decay)
    return torch.optim.Adafactor(groups, lr=config.lr)


def prodigy(module: nn.Module, parameters: Iterable[nn.Parameter], config: TrainConfig) -> torch.optim.Optimizer:
    """Prodigy (arXiv:2306.06101): AdamW that finds its learning rate, which `lr` multiplies; 1 is usual."""
    made = packaged("prodigyopt", "prodigy").Prodigy
    groups = parameter_groups(module, parameters, config.weight_decay)
    with contextlib.redirect_stdout(io.StringIO()):  # it says that its weight decay is AdamW's
        return made(groups, lr=config.lr, betas=config.betas, eps=config.eps, safeguard_warmup=config.warmup > 0)


def packaged(package: str, optimizer: str) -> Any:
    """Raises UsageError if it is not installed."""
    try:
        return importlib.import_module(package)
    except ImportError:
        raise UsageError(f"optimizer={optimizer} needs {package}: pip install 'limner[train]', or take adamw") from None


WHOLE = {"adamw": adamw, "adamw8bit": adamw8bit, "adafactor": adafactor, "prodigy": prodigy}


def optimizers_for(
    module: nn.Module, parameters: Iterable[nn.Parameter], config: TrainConfig
) -> list[torch.optim.Optimizer]:
    """One of `WHOLE` for all `parameters`; with optimizer="muon", Muon for the matrices of repeated blocks, AdamW for
    the rest.

    Muon (Jordan et al., kellerjordan.github.io/posts/muon) makes every update a near-orthogonal matrix; its length is
    matched to AdamW's (arXiv:2502.16982, section 2.2), so that the same `lr` and `weight_decay` serve both. Raises
    UsageError where a package is missing.
    """
    parameters = list(parameters)
    if config.optimizer in WHOLE:
        return [WHOLE[config.optimizer](module, parameters, config)]
    chosen = {id(p) for p in block_matrices(module)}
    matrices = [p for p in parameters if id(p) in chosen]
    rest = [p for p in parameters if id(p) not in chosen]
    found: list[torch.optim.Optimizer] = [adamw(module, rest, config)] if rest else []
    if matrices:
        found.append(Muon(matrices, config.lr, config.weight_decay, adjust_lr_fn="match_rms_adamw"))
        found[-1].param_groups[0]["lr_scale"] = config.muon_lr_scale
    return found


def block_matrices(module: nn.Module) -> list[nn.Parameter]:
    """Weights of the linear layers that lie in some ModuleList, the repeated blocks of a transformer: not those that
    read the input, embed, or write the output, which AdamW serves better."""
    lists = [m for m in module.modules() if isinstance(m, nn.ModuleList)]
    layers = [m for blocks in lists for m in blocks.modules() if isinstance(m, nn.Linear)]
    return [p for layer in layers for name, p in layer.named_parameters() if name == "weight"]


def step_unless(optimizer: torch.optim.Optimizer, lr: float, bad: Tensor) -> None:
    """One update at learning rate `lr`, or none at all where `bad` (float32 scalar on the device) is 1.

    AdamW and Muon read `bad` on the device, as they do for torch's gradient scaler; for others the host waits for it.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
    if isinstance(optimizer, Muon | torch.optim.AdamW):
        optimizer.found_inf = everywhere(bad, optimizer.param_groups[0]["params"][0])  # type: ignore[union-attr]
        optimizer.step()
    elif not bad:
        optimizer.step()


class Muon(torch.optim.Muon):
    """torch's Muon, with matrices of one shape orthogonalised in one product: 50 matrices of four shapes cost the host
    a hundred launches instead of a thousand, which took as long as half a training step. Heeds `found_inf`."""

    found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            alike: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    alike[p.shape].append(p)
            for shape, parameters in alike.items():
                self._move(parameters, group, 0.2 * math.sqrt(max(shape)))

    def _move(self, parameters: list[Tensor], group: dict, scale: float) -> None:
        """One update of matrices of one shape; `scale` makes it as long as AdamW's (arXiv:2502.16982, equation 4)."""
        lr, decay, momentum = group["lr"], group["weight_decay"], group["momentum"]
        momenta = [self.state[p].setdefault("momentum_buffer", torch.zeros_like(p)) for p in parameters]
        weights, before = torch.stack(parameters), torch.stack(momenta)
        grads = torch.stack([p.grad for p in parameters if p.grad is not None])
        mean = before.lerp(grads, 1 - momentum)
        update = orthogonalised(grads.lerp(mean, momentum), group["ns_coefficients"], group["ns_steps"])
        moved = weights * (1 - lr * decay) - lr * scale * update.float()
        if self.found_inf is not None:
            mean = torch.where(self.found_inf > 0, before, mean)
            moved = torch.where(self.found_inf > 0, weights, moved)
        torch._foreach_copy_(momenta, list(mean.unbind()))
        torch._foreach_copy_(parameters, list(moved.unbind()))


def orthogonalised(matrices: Tensor, coefficients: tuple[float, float, float], steps: int) -> Tensor:
    """(n, rows, columns) -> bfloat16 matrices with the same singular vectors and singular values near 1, by the quintic
    Newton-Schulz iteration of Muon."""
    a, b, c = coefficients
    tall = matrices.shape[1] > matrices.shape[2]
    x = (matrices.mT if tall else matrices).bfloat16()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def clip_gradients(parameters: Iterable[nn.Parameter], longest: float) -> Tensor:
    """Scale the gradients to a 2-norm of at most `longest` (0 for no limit); returns the norm before, a scalar."""
    parameters = list(parameters)
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if longest > 0:
        nn.utils.clip_grads_with_norm_(parameters, longest, norm)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
