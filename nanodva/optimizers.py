"""
How a gradient becomes a step: the learning rate's schedule, which optimizer has which parameters,
and Muon.
"""
import math

import torch

# The banks' optimizer as their authors set it (arXiv 2606.02780): a row is seen rarely, and slow
# averages let it go on moving after its token was seen. A bank's scale learns faster than all else.
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


def set_learning_rate(optimizers, lr):
    """Give each parameter group its multiple of the learning rate lr."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_multiple"]


def parameter_groups(model):
    """
    Each parameter that a GPT learns in exactly one group, {name: list of parameters}:

        matrices      2-D weights of the blocks, for which Muon is made
        embeddings    tokens and positions, and what else has two dimensions or more
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
        elif p.dim() == 2 and p in in_blocks:
            groups["matrices"].append(p)
        else:
            groups["embeddings"].append(p)
    return groups


def build_optimizers(model, cfg):
    """
    The optimizers of a training run: AdamW for everything, or Muon for the matrices and AdamW for
    the rest. Each group of theirs learns at `lr_multiple` times the learning rate. Muon multiplies
    in the type cfg.dtype, as the model does; in float32 where that is still auto.
    """
    groups = parameter_groups(model)
    dtype = torch.float32 if cfg.dtype == "auto" else getattr(torch, cfg.dtype)
    optimizers = []
    matrices = groups["matrices"]
    if cfg.optimizer == "muon" and matrices:
        optimizers.append(Muon(matrices, cfg.learning_rate, cfg.weight_decay, dtype=dtype))
        matrices = []
    adamw = [dict(params=groups["embeddings"], lr_multiple=cfg.embedding_lr,
                  weight_decay=cfg.weight_decay),
             dict(params=matrices, weight_decay=cfg.weight_decay),
             dict(params=groups["vectors"], weight_decay=0.0),
             dict(params=groups["tables"], lr_multiple=cfg.bank_lr, **TABLE),
             dict(params=groups["gammas"], **GAMMA)]
    adamw = [group for group in adamw if group["params"]]
    optimizers.append(torch.optim.AdamW(adamw, lr=cfg.learning_rate, betas=(cfg.beta1, cfg.beta2),
                                        fused=True))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group.setdefault("lr_multiple", 1.0)
    return optimizers


# ---- Muon --------------------------------------------------------------------------------------

class Muon(torch.optim.Optimizer):
    """
    Momentum whose singular values are brought near 1 before it is applied, for matrices alone
    (Keller Jordan et al. 2024, kellerjordan.github.io/posts/muon). The step is scaled to the size
    of AdamW's, so that one learning rate serves both (arXiv 2502.16982).

    The numbers are those of torch.optim.Muon, which takes one matrix at a time. Here all matrices
    of one shape go together: a quarter to two thirds of its time for models up to 384 wide. They
    are multiplied in the type dtype: a CPU without instructions for bfloat16 takes a hundred times
    as long in it as in float32. Raises ValueError for a parameter that is no matrix.
    """

    def __init__(self, params, lr, weight_decay=0.1, momentum=0.95, dtype=torch.bfloat16):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))
        self.dtype = dtype
        for group in self.param_groups:
            for p in group["params"]:
                if p.dim() != 2:
                    raise ValueError(f"Muon is for matrices: a parameter has the shape "
                                     f"{tuple(p.shape)}")

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape = {}
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault(p.shape, []).append(p)
            for shape, params in by_shape.items():
                grads = [p.grad for p in params]
                momenta = [self.momentum_of(p) for p in params]
                torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
                # Nesterov's look ahead: the gradient, moved towards the momentum
                ahead = torch._foreach_lerp(grads, momenta, group["momentum"])
                updates = orthogonal(torch.stack(ahead), self.dtype)
                updates = updates.to(params[0].dtype).unbind()
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
                size = 0.2 * max(shape) ** 0.5
                torch._foreach_add_(params, updates, alpha=-group["lr"] * size)

    def momentum_of(self, p):
        """The running mean of p's gradients, zero before its first step."""
        if "momentum_buffer" not in self.state[p]:
            self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        return self.state[p]["momentum_buffer"]


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
    x = x.to(dtype)                                   # now that float16 can hold even small numbers
    for _ in range(5):
        gram = x @ x.mT                                                # (N, side, side)
        polynomial = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, polynomial, x, beta=3.4445)
    return x.mT if tall else x
