"""
How a gradient becomes a step: the learning rate's schedule, the optimizers and which of them has which parameters, clipping.
"""
import math

import torch


def learning_rate(step, cfg):
    """Linear warm-up, then half a cosine from learning_rate to min_lr, which stays."""
    if not cfg.decay_lr:
        return cfg.learning_rate
    if step < cfg.warmup_iters:
        return cfg.learning_rate * (step + 1) / (cfg.warmup_iters + 1)
    done = (step - cfg.warmup_iters) / max(1, cfg.lr_decay_iters - cfg.warmup_iters)
    return cfg.min_lr + 0.5 * (1 + math.cos(math.pi * min(done, 1))) * (cfg.learning_rate - cfg.min_lr)


def build_optimizers(model, cfg):
    """
    AdamW for all, or Muon for the blocks' matrices and AdamW for the rest; and for the banks' tables Adam on the rows of
    the step's own tokens alone: the other rows, nearly all, keep value and moments as they are, and cost nothing.
    Each parameter is in exactly one group.
    """
    groups = model.parameter_groups()
    muon, adamw = (groups["matrices"], []) if cfg.optimizer == "muon" else ([], groups["matrices"])
    optimizers = [Muon(muon, lr=cfg.learning_rate, weight_decay=cfg.weight_decay)] if muon else []
    optimizers += [torch.optim.AdamW([{"params": adamw + groups["embeddings"], "weight_decay": cfg.weight_decay},
                                      {"params": groups["vectors"], "weight_decay": 0.0}],
                                     lr=cfg.learning_rate, betas=(cfg.beta1, cfg.beta2), fused=True)]
    if groups["banks"]:
        optimizers += [torch.optim.SparseAdam([{"params": groups["banks"], "lr_scale": cfg.bank_lr}],
                                              betas=(cfg.beta1, cfg.beta2))]
    held = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    assert len(held) == len(set(held)) and set(held) == set(model.parameters())
    return optimizers


def clip_gradients(model, largest):
    """Scale all gradients down together if their norm is above `largest` (0: never). Returns the norm before."""
    for bank in model.banks():                                         # one row per token that was seen
        grad = bank.weight.grad
        bank.weight.grad = grad.coalesce() if grad.is_sparse else grad.to_sparse(1).coalesce()
    grads = [p.grad.values() if p.grad.is_sparse else p.grad for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(grads)
    if largest:
        torch._foreach_mul_(grads, (largest / (norm + 1e-6)).clamp(max=1))
    return norm


# ---- Muon -----------------------------------------------------------------------------------------------------------
# The numbers are torch.optim.Muon's (bit for bit where we compared them, on a CPU). That takes a matrix at a time, and for a
# small model those many small products were a third of a step; here all matrices of one shape go through them together, in
# 0.47 of its time for 4 gpt2 layers of 128 and 0.27 for dva's, 0.67 and 0.44 for 6 of 384, 0.95 and 0.62 for 12 of 768.

class Muon(torch.optim.Optimizer):
    """
    Momentum, made orthogonal before it is applied (Keller Jordan et al. 2024, kellerjordan.github.io/posts/muon), for
    matrices (rows, columns) alone. The step is scaled to be as large as AdamW's, so that one learning rate serves
    both (arXiv 2502.16982). Raises ValueError for a parameter that is no matrix.
    """

    def __init__(self, params, lr, weight_decay=0.1, momentum=0.95):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))
        for p in (p for group in self.param_groups for p in group["params"]):
            if p.dim() != 2:
                raise ValueError(f"Muon is for matrices: this parameter has the shape {tuple(p.shape)}")

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            alike = {}                                                 # shape: its parameters
            for p in group["params"]:
                if p.grad is not None:
                    alike.setdefault(p.shape, []).append(p)
            for shape, params in alike.items():
                grads = [p.grad for p in params]
                momenta = [self.state[p].setdefault("momentum_buffer", torch.zeros_like(p)) for p in params]
                torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
                ahead = torch._foreach_lerp(grads, momenta, group["momentum"])                   # Nesterov's
                updates = orthogonal(torch.stack(ahead)).to(params[0].dtype).unbind()
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(params, updates, alpha=-group["lr"] * (0.2 * max(shape) ** 0.5))


def orthogonal(x):
    """
    Matrices x (N, rows, columns) with their singular values brought near 1, in bfloat16: five Newton-Schulz steps
    x <- a x + b (x x^T) x + c (x x^T)^2 x, an odd polynomial that acts on the singular values alone, with Jordan's
    coefficients, steep at zero. They end between about 0.7 and 1.2, which serves as well as 1.
    """
    tall = x.size(1) > x.size(2)
    x = (x.mT if tall else x).bfloat16()                               # the smaller side first: smaller products
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)           # no singular value above 1
    for _ in range(5):
        gram = x @ x.mT                                                # (N, side, side)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.mT if tall else x
