"""
The model: GPT-2 blocks, DVA blocks, and a Bank of Values under either of them.

  GPT-2  multi-head attention, then an MLP           Radford et al. 2019; names and shapes are theirs
  DVA    one head, no MLP, a value for every pair    Dynamic Value Attention, arXiv 2512.22212
  BoV    values looked up by token id                Bank of Values, arXiv 2606.02780

To add a block: write a class like DVABlock below and give it a line in BLOCKS. The command line, checkpoints, sampling,
the race and the tests follow.

Shapes: B batch, T time, S time with the cached past, C n_embd, H heads, D qk_dim, M value_dim, V vocab_size.
"""
import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

from config import check


@dataclass
class ModelConfig:
    block: str = "gpt2"          # kind of block: a key of BLOCKS in model.py
    block_size: int = 1024       # context length T, in tokens
    vocab_size: int = 0          # rows of the token table; 0: from the data set (50257 is padded to 50304, as in nanoGPT)
    n_layer: int = 12            # blocks
    n_head: int = 12             # heads of a gpt2 block (a dva block has one)
    n_embd: int = 768            # width C of the residual stream
    dropout: float = 0.0         # 0 for pre-training, 0.1 and more for small data sets
    bias: bool = False           # biases in Linear and LayerNorm, as GPT-2 has them
    gelu: str = "exact"          # exact (nanoGPT's) or tanh (OpenAI's GPT-2)
    qk_dim: int = 64             # dva: width D of query and key
    value_dim: int = 0           # dva: width M of value and gate; 0: n_embd
    value_norm: bool = True      # dva: RMSNorm on the mixed value
    shift: bool | str = "auto"   # half of the channels of keys and values come from the previous position; auto: for dva
    rotary: bool | str = "auto"  # rotary positions on queries and keys, beside the learned ones; auto: for dva
    num_tokens: int = 0          # rows of the table that are tokens, where weights came with a padded one; 0: all
    bank_layers: int = 0         # last N layers take their values from a Bank of Values; the paper: n_layer // 3

    def __post_init__(self):
        check(self, least=dict(block_size=1, n_layer=1, n_head=1, n_embd=1, qk_dim=1, vocab_size=0, value_dim=0, dropout=0,
                               num_tokens=0, bank_layers=0),
              choices=dict(block=list(BLOCKS), gelu=["exact", "tanh"], shift=[True, False, "auto"], rotary=[True, False, "auto"]))
        if self.block == "gpt2" and self.n_embd % self.n_head:
            raise ValueError(f"n_embd={self.n_embd} does not divide into n_head={self.n_head} heads")
        name, width = ("n_embd / n_head", self.n_embd // self.n_head) if self.block == "gpt2" else ("qk_dim", self.qk_dim)
        if width % 2 and (self.rotary is True or (self.rotary, self.block) == ("auto", "dva")):
            raise ValueError(f"{name}={width}: rotary positions turn channels in pairs; make it even, or --rotary=False")
        if self.dropout >= 1:
            raise ValueError(f"dropout={self.dropout}: it must be below 1")
        if self.bank_layers > self.n_layer:
            raise ValueError(f"bank_layers={self.bank_layers}: it must be at most n_layer={self.n_layer}")


class Cache:
    """What attention remembers while decoding, (B, length, ...) per tensor: room for `size` positions, taken once."""

    def __init__(self, size):
        self.size, self.length, self.memory = size, 0, {}

    def extend(self, owner, *new):
        """Append tensors (B, T, ...) to what the module `owner` stored before; return each as (B, length + T, ...)."""
        end = self.length + new[0].size(1)
        if owner not in self.memory:
            self.memory[owner] = [x.new_empty(x.size(0), self.size, *x.shape[2:]) for x in new]
        for past, x in zip(self.memory[owner], new):
            past[:, self.length:end] = x
        return [past[:, :end] for past in self.memory[owner]]


def fused(q, k, v, dropout=0.0):
    """Causal attention by torch's own kernels; shapes as in attend()."""
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=q.size(-2) > 1)


def explicit(q, k, v, dropout=0.0, rows=256):
    """Causal attention as the textbook writes it, in blocks of queries that skip most of the masked half; shapes as in attend()."""
    T, q, mixed = q.size(-2), q / math.sqrt(q.size(-1)), []
    for first in range(0, T, rows):
        seen = k.size(-2) if T == 1 else first + rows                  # slices end where the tensor does
        scores = q[..., first:first + rows, :] @ k[..., :seen, :].mT   # (B, H, rows, seen)
        if T > 1:
            scores = scores + torch.full_like(scores[0, 0], -math.inf).triu(first + 1)
        mixed.append(F.dropout(scores.softmax(dim=-1), dropout).to(v.dtype) @ v[..., :seen, :])
    return torch.cat(mixed, dim=-2)


def attend(q, k, v, dropout=0.0):
    """
    Causal softmax attention: q (B, H, T, D), k (B, H, S, D), v (B, H, S, M) -> (B, H, T, M).

    Either T == S, or T == 1 and the query is the newest position, which sees all S. Of the two ways to the same numbers the
    explicit one is faster on a CPU where D != M, which has no fused kernel there (0.2 to 0.9 of its time), and for windows
    up to 256. python -m tools.bench --attentions=fused,explicit tries both.
    """
    cpu, alike, short = q.device.type == "cpu", q.size(-1) == v.size(-1), q.size(-2) <= 256
    return explicit(q, k, v, dropout) if cpu and (short or not alike) else fused(q, k, v, dropout)


@torch.compiler.disable                # it has no sparse gradients
def look_up(tables, ids):
    """
    Rows of every table (V, N) for ids (B, S): (B, S, N) each. Their gradients are sparse, one row per id, so that a step costs
    what its own tokens cost and not a table's size; between processes, where not every backend adds sparse ones, dense.
    """
    sparse = not (dist.is_available() and dist.is_initialized())
    return [F.embedding(ids, table, sparse=sparse) for table in tables]


def shift_half(x):
    """The first half of the channels of x (B, S, N) moved on by one position (zeros enter at the first)."""
    half = x.size(-1) // 2
    return torch.cat((F.pad(x[:, :-1, :half], (0, 0, 1, 0)), x[..., half:]), dim=-1)


def rotate(q, k):
    """
    Rotary positions (arXiv 2104.09864) for keys k (..., S, N) and the queries q (..., T, N) of the last T of their positions:
    every pair of channels (c, c + N/2) is turned by position x speed, each pair at a speed of its own. The angle between a
    query and a key then grows with their distance, which q.k can so tell, wherever they are. N is even.
    """
    S, half = k.size(-2), k.size(-1) // 2
    speed = 10000.0 ** (-torch.arange(half, device=k.device) / half)                             # radians per position
    angle = torch.arange(S, device=k.device)[:, None] * speed          # (S, N/2)
    cos = torch.cat((angle.cos(), angle.cos()), dim=-1).to(k.dtype)    # (S, N)
    sin = torch.cat((-angle.sin(), angle.sin()), dim=-1).to(k.dtype)
    return [x * cos[-x.size(-2):] + x.roll(half, dims=-1) * sin[-x.size(-2):] for x in (q, k)]


class RMSNorm(nn.RMSNorm):
    """torch's, arXiv 1910.07467. On a CPU, which has no kernel for it, by the row's length: half the time of torch's steps."""

    def forward(self, x):
        """x (..., M) -> (..., M), in the type of x."""
        weight = self.weight.to(x.dtype)                               # as the fused kernel wants it under autocast
        if x.device.type != "cpu":
            return F.rms_norm(x, self.normalized_shape, weight, self.eps)
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)               # (..., 1)
        return x * torch.rsqrt(length ** 2 / x.size(-1) + self.eps).to(x.dtype) * weight


class CausalSelfAttention(nn.Module):
    """GPT-2's multi-head attention; in a bank layer the values are rows of the bank."""

    def __init__(self, config, banked):
        super().__init__()
        C = config.n_embd
        self.n_head, self.dropout = config.n_head, config.dropout
        self.shift, self.rotary = config.shift is True, config.rotary is True
        self.c_attn = nn.Linear(C, 2 * C if banked else 3 * C, bias=config.bias)
        self.c_proj = nn.Linear(C, C, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.bank = nn.Embedding(config.vocab_size, C) if banked else None
        self.bank_scale = nn.Parameter(torch.ones(())) if banked else None
        self.pair_width = 2 * C                                        # multiplications per query-key pair

    def forward(self, x, rows=None, cache=None):
        """x (B, T, C), in a bank layer the bank's rows (B, S, C) -> (B, T, C)"""
        B, T, C = x.shape
        q, k, *v = self.c_attn(x).split(C, dim=2)                      # (B, T, C) each; a bank layer has no v
        if cache is not None:
            k, *v = cache.extend(self, k, *v)                          # (B, S, C) each
        v = v[0] if v else self.bank_scale * rows                      # (B, S, C)
        if self.shift:
            k, v = shift_half(k), shift_half(v)
        q, k, v = (t.view(B, -1, self.n_head, C // self.n_head).transpose(1, 2) for t in (q, k, v))   # (B, H, S, C/H)
        if self.rotary:
            q, k = rotate(q, k)
        y = attend(q, k, v, self.dropout if self.training else 0.0)
        y = y.transpose(1, 2).reshape(B, T, C)
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    """GPT-2's MLP, four times as wide as the stream."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.gelu = nn.GELU(approximate="tanh" if config.gelu == "tanh" else "none")
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        """x (B, T, C) -> (B, T, C)"""
        return self.dropout(self.c_proj(self.gelu(self.c_fc(x))))


class GPT2Block(nn.Module):
    """x + CausalSelfAttention(LayerNorm(x)), then x + MLP(LayerNorm(x)); x is (B, T, C)."""

    def __init__(self, config, banked=False):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config, banked)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, rows=None, cache=None):
        x = x + self.attn(self.ln_1(x), rows, cache)
        return x + self.mlp(self.ln_2(x))


class DynamicValueAttention(nn.Module):
    """
    One head, and a value of its own for every pair of positions (arXiv 2512.22212; the equations are this project's reading).

    With q_i, k_j the query and key, g_i a gate made from the query's position and u_j a value made from the key's:

        s_ij = softmax over j <= i of q_i.k_j / sqrt(D)      the pair's strength
        v_ij = g_i * u_j                                     the pair's own value (elementwise): its meaning
        y_i  = W_o sum_j s_ij v_ij

    A tensor of all v_ij would be (T, T, M). It is never built: once i is fixed, v_ij is linear in u_j, so the gate comes
    out of the sum, sum_j s_ij v_ij = g_i * sum_j s_ij u_j, and that is ONE ordinary attention call. The RMSNorm keeps
    this reading, since it only rescales per query: v_ij = (w * g_i / rms_i) * u_j.

    One head looks at one place at a time. Two additions of this project help it, at no weight more: with shift, half of the
    channels of k_j and u_j are those of position j - 1, so that a look at j sees its neighbour, too; with rotary, q_i and k_j
    are turned by their positions, so that it finds a place by its distance.
    """

    def __init__(self, config, banked):
        super().__init__()
        C, D, M = config.n_embd, config.qk_dim, config.value_dim or config.n_embd
        self.shift, self.rotary, self.dropout = config.shift is not False, config.rotary is not False, config.dropout
        self.c_q = nn.Linear(C, D, bias=config.bias)
        self.c_k = nn.Linear(C, D, bias=config.bias)
        self.c_v = None if banked else nn.Linear(C, M, bias=config.bias)
        self.c_gate = nn.Linear(C, M, bias=config.bias)
        self.norm = RMSNorm(M, eps=1e-5) if config.value_norm else nn.Identity()
        self.c_proj = nn.Linear(M, C, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.bank = nn.Embedding(config.vocab_size, M) if banked else None
        self.bank_scale = nn.Parameter(torch.ones(())) if banked else None     # the norm, where on, cancels its size
        self.pair_width = D + M                                        # multiplications per query-key pair

    def forward(self, x, rows=None, cache=None):
        """x (B, T, C), in a bank layer the bank's rows (B, S, M) -> (B, T, C)"""
        if torch.is_autocast_enabled(x.device.type):                   # cast once, and not for each product
            x = x.to(torch.get_autocast_dtype(x.device.type))
        q, k, g = self.c_q(x), self.c_k(x), self.c_gate(x)             # (B, T, D), (B, T, D), (B, T, M)
        u = [self.c_v(x)] if self.bank is None else []                 # (B, T, M); a bank layer makes none
        if cache is not None:
            k, *u = cache.extend(self, k, *u)                          # (B, S, D), (B, S, M)
        u = u[0] if u else self.bank_scale * rows                      # (B, S, M)
        if self.shift:
            k, u = shift_half(k), shift_half(u)
        if self.rotary:
            q, k = rotate(q, k)
        q, k, u = q.unsqueeze(1), k.unsqueeze(1), u.unsqueeze(1)       # one head: (B, 1, S, ...)
        y = attend(q, k, u, self.dropout if self.training else 0.0).squeeze(1)                        # (B, T, M)
        return self.resid_dropout(self.c_proj(self.norm(y) * g))


class DVABlock(nn.Module):
    """x + DynamicValueAttention(LayerNorm(x)); x is (B, T, C). No MLP: arXiv 2512.22212."""

    def __init__(self, config, banked=False):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = DynamicValueAttention(config, banked)

    def forward(self, x, rows=None, cache=None):
        return x + self.attn(self.ln_1(x), rows, cache)


BLOCKS = {"gpt2": GPT2Block, "dva": DVABlock}


class GPT(nn.Module):
    """A decoder-only transformer of config.n_layer blocks, with GPT-2's parameter names."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        V, C, L = config.vocab_size, config.n_embd, config.n_layer
        Block = BLOCKS[config.block]
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(V, C),
            wpe=nn.Embedding(config.block_size, C),
            drop=nn.Dropout(config.dropout),
            h=nn.ModuleList(Block(config, banked=layer >= L - config.bank_layers) for layer in range(L)),
            ln_f=nn.LayerNorm(C, bias=config.bias),
        ))
        self.lm_head = nn.Linear(C, V, bias=False)
        self.transformer.wte.weight = self.lm_head.weight              # tied, arXiv 1608.05859
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """GPT-2's: N(0, 0.02), and projections into the stream smaller, so that 2L of them add up to the same size."""
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * self.config.n_layer))
            elif p.dim() == 2:
                nn.init.normal_(p, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)
        self.init_banks()

    @torch.no_grad()
    def init_banks(self):
        """A bank starts as the values that a fresh W_v would make of every token's embedding (arXiv 2606.02780)."""
        tokens = F.layer_norm(self.transformer.wte.weight, (self.config.n_embd,))                     # (V, C)
        for bank in self.banks():
            w_v = torch.empty(bank.embedding_dim, self.config.n_embd, device=tokens.device).normal_(std=0.02)
            bank.weight.copy_(tokens @ w_v.T)                          # (V, M)

    def banks(self):
        """The tables of the bank layers, (V, M) each."""
        return [m.bank for m in self.modules() if getattr(m, "bank", None) is not None]

    def forward(self, idx, targets=None, cache=None):
        """
        Token ids idx (B, T), and perhaps what follows each, targets (B, T) with -1 where nothing counts.

        Returns (logits (B, T, V), mean cross-entropy in nats), or without targets (logits of the last position
        (B, 1, V), None). With a Cache, idx continues the positions that the cache holds, and is added to it.
        Raises ValueError where the positions exceed block_size.
        """
        past = 0 if cache is None else cache.length
        end = past + idx.size(1)
        if end > self.config.block_size:
            raise ValueError(f"{end} positions do not fit into block_size={self.config.block_size}")
        pos = torch.arange(past, end, device=idx.device)
        # lm_head gives the tied table a dense gradient; a second one, for the look-up, cost 3 % of a dva step on a CPU
        tok = F.embedding(idx, self.transformer.wte.weight, sparse=not torch.compiler.is_compiling())
        x = self.transformer.drop(tok + self.transformer.wpe(pos))     # (B, T, C)
        banks = self.banks()
        rows = [None] * (len(self.transformer.h) - len(banks))         # only the last layers have banks
        if banks:                                                      # here, as a break of the graph in a loop undoes it all
            ids = idx if cache is None else cache.extend(self, idx)[0]             # (B, S): no layer remembers values
            rows += look_up([bank.weight for bank in banks], ids)      # (B, S, N) each
        for block, found in zip(self.transformer.h, rows):
            x = block(x, found, cache)
        x = self.transformer.ln_f(x)
        if cache is not None:
            cache.length = end
        V = self.config.num_tokens or self.config.vocab_size           # padded rows are no choice, nor part of the loss
        if targets is None:
            return self.lm_head(x[:, [-1]])[..., :V], None             # (B, 1, V)
        logits = self.lm_head(x)[..., :V]                              # (B, T, V)
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)

    @torch.no_grad()
    def stream(self, idx, max_new_tokens, temperature=1.0, top_k=0, stop_token=-1, num_tokens=0, top_p=1.0,
               use_cache=True):
        """
        Continue each row of idx (B, T), T >= 1, yielding the next ids (B, 1) one after another.

        temperature 0 takes the likeliest token; top_k and num_tokens, where not 0, draw only from the k likeliest and
        only from ids below num_tokens (a padded table has rows that are no token). What is left by these, top_p below 1
        cuts to the nucleus: the fewest likeliest tokens that together have this probability (arXiv 1904.09751). A row
        that has drawn stop_token goes on with stop_token, and when all have, the stream ends.

        The cache is filled once with the prompt and then grows by a token at a time. When the window is full (positions
        are learned, so it cannot slide), its newest half becomes the new prompt: a token sees between block_size / 2
        and block_size others. Without the cache, which is for tests and timings, the same windows are recomputed.
        """
        size = self.config.block_size
        window = idx[:, -size:]
        cache = Cache(min(size, window.size(1) + max_new_tokens))
        new = window                                                   # what the cache has not seen
        stopped = torch.zeros_like(idx[:, :1], dtype=torch.bool)
        for _ in range(max_new_tokens):
            if window.size(1) > size:
                window, cache = window[:, -max(1, size // 2):], Cache(size)
                new = window
            logits, _ = self(new, cache=cache) if use_cache else self(window)
            logits = logits[:, -1].float()                             # (B, V)
            if num_tokens:
                logits[:, num_tokens:] = -math.inf
            if temperature == 0:
                new = logits.argmax(dim=-1, keepdim=True)              # (B, 1)
            else:
                order, chances = None, (logits / temperature).softmax(dim=-1)
                if top_k or top_p < 1:
                    V = logits.size(-1)
                    chances, order = chances.topk(min(top_k or V, V))  # (B, k), the likeliest first
                if top_p < 1:
                    share = chances / chances.sum(dim=-1, keepdim=True)
                    chances = chances.masked_fill(share.cumsum(dim=-1) - share >= top_p, 0)      # the likelier ones have it already
                # One number, and its place among the sums. torch.multinomial draws one for every token of the vocabulary:
                # on a CPU 4 % (gpt2) to 8 % (dva) of a token's time at the 124M shapes
                sums = chances.cumsum(dim=-1)
                new = torch.searchsorted(sums, (1 - torch.rand_like(sums[:, :1])) * sums[:, -1:])      # in (0, 1]: no token of chance 0
                new = new if order is None else order.gather(-1, new)  # (B, 1)
            new = new.masked_fill(stopped, stop_token)
            window = torch.cat((window, new), dim=1)
            yield new
            stopped |= new == stop_token
            if stopped.all():
                return

    def generate(self, idx, max_new_tokens, **options):
        """idx (B, T) with up to max_new_tokens more on each row, (B, T + n); the options are those of stream()."""
        return torch.cat([idx, *self.stream(idx, max_new_tokens, **options)], dim=1)

    def num_params(self):
        """Numbers in the model; the tied token table counts once."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self):
        """
        FLOPs of training on one token in a full window: every matrix product once forward (2 FLOPs per multiplication,
        all T x T pairs, as torch.utils.flop_counter counts them) and twice backward. Look-ups cost none.
        """
        linear = sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))
        pairs = sum(m.pair_width for m in self.modules() if hasattr(m, "pair_width")) * self.config.block_size
        return 3 * 2 * (linear + pairs)

    def parameter_groups(self):
        """
        Every parameter in one of four groups: `matrices` (the blocks' 2-D weights: what Muon is for), `embeddings`
        (tokens and positions), `banks` (their tables: a row learns only when its token is seen), `vectors` (the rest).
        """
        groups = {"matrices": [], "embeddings": [], "banks": [], "vectors": []}
        for name, p in self.named_parameters():
            group = ("vectors" if p.dim() < 2 else "banks" if name.endswith("bank.weight")
                     else "matrices" if name.startswith("transformer.h.") else "embeddings")
            groups[group].append(p)
        return groups

    def load_weights(self, state):
        """Copy in what fit_weights() returned. Blocks it left out stay fresh, their banks made from the embeddings."""
        if self.load_state_dict(state, strict=False).missing_keys:
            self.init_banks()

    @classmethod
    def from_pretrained(cls, name_or_path, **changes):
        """
        The GPT whose weights name_or_path names (checkpoints.py says which there are), with changes to its settings:
        dropout, a smaller block_size, another block. Raises ValueError for a change that contradicts the weights.
        """
        from checkpoints import fit_weights, read_weights            # which import this file
        weights = read_weights(name_or_path)
        model = cls(ModelConfig(**weights["model_config"] | changes))
        model.load_weights(fit_weights(weights, model.config))
        return model
