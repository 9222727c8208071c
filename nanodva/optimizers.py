"""
How a gradient becomes a step: the schedule of the learning rate, which parameters Muon and AdamW
have, and the optimizer that applies both.
"""
import math

import torch
from torch.optim.adamw import adamw

# The banks' optimizer as their authors set it (arXiv 2606.02780). A token is rare, and so are its
# row's gradients: their first moving average is short, the second one long.
TABLE = dict(betas=(0.8, 0.995), eps=1e-10, weight_decay=0.01)
GAMMA = dict(betas=(0.96, 0.95), eps=1e-10, weight_decay=0.0, lr_multiple=25.0)


def learning_rate(step, cfg):
    """A linear warm-up, then half a cosine from learning_rate down to min_lr, and min_lr after."""
    if not cfg.decay_lr:
        return cfg.learning_rate
    if step < cfg.warmup_iters:
        return cfg.learning_rate * (step + 1) / (cfg.warmup_iters + 1)
    done = (step - cfg.warmup_iters) / max(1, cfg.lr_decay_iters - cfg.warmup_iters)
    cosine = 0.5 * (1 + math.cos(math.pi * min(done, 1)))
    return cfg.min_lr + cosine * (cfg.learning_rate - cfg.min_lr)


def set_learning_rate(optimizer, lr):
    """Give each parameter group its multiple of the learning rate lr."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_multiple"]


def parameter_groups(model):
    """
    Each trainable parameter of a GPT in exactly one group, {name: list of parameters}:

        matrices      weights of the blocks with two dimensions or more, for which Muon is made
        embeddings    tokens and positions
        vectors       biases and the scales of norms, which are never decayed
        tables        the banks' tables
        gammas        the banks' scales
    """
    groups = {"matrices": [], "embeddings": [], "vectors": [],
              "tables": [bank.table for bank in model.banks()],
              "gammas": [bank.gamma for bank in model.banks() if bank.gamma.requires_grad]}
    in_banks = set(groups["tables"] + groups["gammas"])
    in_blocks = set(model.transformer.h.parameters())
    for p in model.parameters():
        if p in in_banks or not p.requires_grad:
            continue
        if p.dim() < 2:
            groups["vectors"].append(p)
        elif p in in_blocks:
            groups["matrices"].append(p)
        else:
            groups["embeddings"].append(p)
    return groups


def build_optimizer(model, cfg):
    """
    The optimizer of a training run: AdamW for everything, or with cfg.optimizer="muon" Muon for
    the matrices and AdamW for the rest. Each group learns at `lr_multiple` times the learning
    rate. Muon multiplies in the type cfg.dtype, as the model does; in float32 if that is auto.
    """
    groups = parameter_groups(model)
    decay, betas = cfg.weight_decay, (cfg.beta1, cfg.beta2)
    matrices = dict(betas=betas, weight_decay=decay)
    if cfg.optimizer == "muon":
        dtype = torch.float32 if cfg.dtype == "auto" else getattr(torch, cfg.dtype)
        matrices = dict(kind="muon", momentum=cfg.momentum, weight_decay=decay, dtype=dtype)
    settings = {"matrices": matrices,
                "embeddings": dict(betas=betas, weight_decay=decay, lr_multiple=cfg.embedding_lr),
                "vectors": dict(betas=betas, weight_decay=0.0),
                "tables": dict(lr_multiple=cfg.bank_lr) | TABLE,
                "gammas": GAMMA}
    optimizer = MuonAdamW([dict(params=groups[name], **settings[name])
                           for name in settings if groups[name]])
    set_learning_rate(optimizer, cfg.learning_rate)
    return optimizer


class MuonAdamW(torch.optim.Optimizer):
    """
    Muon and AdamW as one optimizer, so a float16 step that overflows is skipped for all parameters
    or for none. A group of the kind "muon" needs momentum, weight_decay and dtype, one of the kind
    "adamw", the default, betas, eps (by default 1e-8) and weight_decay. Both need an lr.

    AdamW (arXiv 1711.05101) is torch's fused one. Muon (Keller Jordan et al. 2024,
    kellerjordan.github.io/posts/muon) applies momentum whose singular values are brought near 1,
    to matrices alone; weights of more dimensions are flattened to (rows, columns). Its step is
    scaled to the size of AdamW's, so one learning rate serves both (arXiv 2502.16982). The numbers
    are those of torch.optim.Muon, which takes one matrix at a time. Here all matrices of one shape
    are multiplied together, in the type dtype: a quarter to two thirds of torch.optim.Muon's time
    for models up to 384 wide.
    """

    def __init__(self, groups):
        super().__init__(groups, dict(kind="adamw", lr_multiple=1.0, lr=0.0, eps=1e-8, fused=True))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params and group["kind"] == "muon":
                self.muon_step(params, group)
            elif params:
                self.adamw_step(params, group)

    def adamw_step(self, params, group):
        for p in params:
            if not self.state[p]:
                self.state[p] = {"step": torch.zeros((), device=p.device),
                                 "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        means, squares, steps = ([self.state[p][name] for p in params]
                                 for name in ("exp_avg", "exp_avg_sq", "step"))
        beta1, beta2 = group["betas"]
        adamw(params, [p.grad for p in params], means, squares, [], steps, fused=group["fused"],
              amsgrad=False, maximize=False, beta1=beta1, beta2=beta2, lr=group["lr"],
              weight_decay=group["weight_decay"], eps=group["eps"])

    def muon_step(self, params, group):
        by_shape = {}
        for p in params:
            if not self.state[p]:
                self.state[p] = {"momentum": torch.zeros_like(p)}
            by_shape.setdefault(p.shape, []).append(p)
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        for same in by_shape.values():
            grads, momenta = [p.grad for p in same], [self.state[p]["momentum"] for p in same]
            torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
            # Nesterov's momentum: the gradient, moved towards the new average
            ahead = torch._foreach_lerp(grads, momenta, group["momentum"])
            matrices = torch.stack(ahead).flatten(2)                   # (N, rows, columns)
            updates = orthogonal(matrices, group["dtype"]).to(same[0].dtype)
            size = 0.2 * max(matrices.shape[1:]) ** 0.5
            updates = [update.view_as(p) for update, p in zip(updates, same, strict=True)]
            torch._foreach_add_(same, updates, alpha=-group["lr"] * size)


def orthogonal(x, dtype):
    """
    Matrices x (N, rows, columns) with their singular values brought near 1, in the type dtype.

    Five Newton-Schulz steps x <- a x + b (x x^T) x + c (x x^T)^2 x: an odd polynomial, so it acts
    on the singular values alone. Jordan's coefficients make it steep at zero; the values end
    between about 0.7 and 1.2, which serves as well as 1.
    """
    tall = x.size(1) > x.size(2)
    x = x.mT if tall else x                                            # smaller side first
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)           # no singular value above 1
    # Cast only after normalising: small gradients would underflow in float16
    x = x.to(dtype)
    for _ in range(5):
        gram = x @ x.mT                                                # (N, side, side)
        polynomial = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, polynomial, x, beta=3.4445)
    return x.mT if tall else x
