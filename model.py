"""
A GPT with two kinds of blocks and an optional table of values, in the order of the lesson:

  GPT-2  multi-head attention, then an MLP                         Radford et al. 2019
  DVA    one head, no MLP, a value of its own for every pair       arXiv 2512.22212
  BoV    a Bank of Values, looked up by token id, in either block  arXiv 2606.02780

To add a block, write a class like DVABlock and name it in BLOCKS. The command line, checkpoints,
sampling, the race and the tests then know it.

Letters in shapes: B batch, T positions of this call, S all positions so far (S = T unless a cache
holds earlier ones), C n_embd, H heads, D and M the widths of keys and values, V vocab_size.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F


class ConfigError(ValueError):
    """A setting that no model can have: the message names the value, the options and the fix."""


@dataclass
class ModelConfig:
    block: str = "gpt2"          # kind of block: a name in BLOCKS of model.py
    block_size: int = 1024       # context length T, in tokens
    vocab_size: int = 50304      # rows of the token table; train.py takes the data set's by default
    n_layer: int = 12            # blocks
    n_head: int = 12             # heads of a gpt2 block; a dva block has one
    n_embd: int = 768            # width C of the residual stream
    dropout: float = 0.0         # 0 for pre-training, 0.1 and more for small data sets
    bias: bool = False           # biases in Linear and LayerNorm, as GPT-2 has them
    gelu: str = "exact"          # exact (nanoGPT's) or tanh (OpenAI's GPT-2)
    rotary: bool | str = "auto"  # True, False, only (no learned positions), auto: False for gpt2
    qk_dim: int = 64             # dva: width D of query and key
    value_dim: int = 0           # dva: width M of value and gate; 0: n_embd
    value_norm: bool = True      # dva: RMSNorm on the mixed value
    gate: str = "plain"          # dva: plain, v_ij = g_i * u_j, or open, (1 + g_i) * u_j
    bank_layers: int = 0         # the last N layers have a Bank of Values; the paper: a third

    def __post_init__(self):
        least = dict(block_size=1, vocab_size=1, n_layer=1, n_head=1, n_embd=1, qk_dim=1,
                     value_dim=0, bank_layers=0, dropout=0)
        choices = dict(block=list(BLOCKS), gelu=["exact", "tanh"],
                       rotary=[True, False, "only", "auto"], gate=["plain", "open"])
        for name, lowest in least.items():
            if getattr(self, name) < lowest:
                raise ConfigError(f"{name}={getattr(self, name)}: it must be at least {lowest}")
        for name, options in choices.items():
            if getattr(self, name) not in options:
                raise ConfigError(f"{name}={getattr(self, name)!r}: choose from "
                                  f"{', '.join(map(str, options))}")
        if self.dropout >= 1:
            raise ConfigError(f"dropout={self.dropout}: it must be below 1")
        if self.bank_layers > self.n_layer:
            raise ConfigError(f"bank_layers={self.bank_layers}: it must be at most "
                              f"n_layer={self.n_layer}")
        if self.rotary == "auto":
            self.rotary = self.block != "gpt2"
        self.value_dim = self.value_dim or self.n_embd


# ---- what both kinds of attention share --------------------------------------------------------

class Rotary(nn.Module):
    """
    Rotary positions (arXiv 2104.09864): each pair of channels (c, c + D/2) of a query or key is
    turned by an angle that grows with its position, each pair at a speed of its own. The product of
    a turned query and a turned key then depends on their distance, and not on where they stand.
    """

    def __init__(self, block_size, width):
        super().__init__()
        half = width // 2
        speed = 10000.0 ** (-torch.arange(half) / half)                # radians per position
        angle = torch.arange(block_size)[:, None] * speed              # (block_size, D / 2)
        cos, sin = angle.cos(), angle.sin()
        table = torch.stack((torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)))
        self.register_buffer("table", table, persistent=False)         # (2, block_size, D)

    def forward(self, x, first):
        """x (..., T, D), at the positions from `first` on, turned"""
        cos, sin = self.table.narrow(1, first, x.size(-2)).to(x.dtype)
        return x * cos + x.roll(x.size(-1) // 2, dims=-1) * sin


class Attention(nn.Module):
    """
    What both kinds of attention share: heads, rotary positions, the KV cache, an optional Bank of
    Values, one causal softmax, and the projection back into the residual stream.

    qk_width and value_width count the channels of all heads together. Raises ConfigError where
    they do not divide into heads, or where a head's queries do not divide into pairs of channels.
    """

    def __init__(self, config, banked, n_head, qk_width, value_width):
        super().__init__()
        D = qk_width // n_head
        if qk_width % n_head or value_width % n_head:
            raise ConfigError(f"n_embd={config.n_embd} does not divide into n_head={n_head} heads: "
                              f"choose an n_head that divides it")
        if config.rotary and D % 2:
            raise ConfigError(f"rotary positions turn channels in pairs, and a query has {D} of "
                              f"them: make that even, or leave them out with --rotary=False")
        self.n_head, self.dropout = n_head, config.dropout
        self.multiplications_per_pair = qk_width + value_width
        self.rotary = Rotary(config.block_size, D) if config.rotary else None
        self.bank = BankOfValues(config.vocab_size, value_width) if banked else None
        self.c_proj = Linear(value_width, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def mix(self, q, k, v, idx, cache):
        """
        For each query the sum of the values, weighted by a softmax over all keys up to its own
        position: q, k (B, T, H D), v (B, T, M) -> (B, T, M). Where the layer has a bank, v is None
        and the bank looks up the values of all token ids so far, idx (B, S).
        """
        if self.bank is not None:
            v = self.bank(idx)                                         # (B, S, M)
        q, k, v = (x.unflatten(-1, (self.n_head, -1)).transpose(1, 2) for x in (q, k, v))
        if self.rotary is not None:
            first = 0 if cache is None else cache.length
            q, k = self.rotary(torch.stack((q, k)), first)             # (B, H, T, D)
        if cache is not None:
            k = cache.append(cache.keys, self, k)                      # (B, H, S, D)
        if cache is not None and self.bank is None:
            v = cache.append(cache.values, self, v)                    # (B, H, S, M / H)
        y = attend(q, k, v, self.dropout if self.training else 0.0)    # (B, H, T, M / H)
        return y.transpose(1, 2).flatten(2)


# ---- GPT-2 -------------------------------------------------------------------------------------

class CausalSelfAttention(Attention):
    """GPT-2's attention: several heads, and for each key one value, which all queries read."""

    def __init__(self, config, banked):
        C = config.n_embd
        super().__init__(config, banked, config.n_head, qk_width=C, value_width=C)
        self.c_attn = Linear(C, 2 * C if banked else 3 * C, bias=config.bias)

    def forward(self, x, idx, cache=None):
        """x (B, T, C), all token ids so far idx (B, S) -> (B, T, C)"""
        q, k, *v = self.c_attn(x).split(x.size(-1), dim=-1)            # a bank layer has no v
        y = self.mix(q, k, v[0] if self.bank is None else None, idx, cache)
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    """GPT-2's MLP, four times as wide as the stream."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.gelu = nn.GELU(approximate="tanh" if config.gelu == "tanh" else "none")
        self.c_proj = Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(self.gelu(self.c_fc(x))))


class GPT2Block(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)); x is (B, T, C)."""

    def __init__(self, config, banked):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config, banked)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, idx, cache=None):
        x = x + self.attn(self.ln_1(x), idx, cache)
        return x + self.mlp(self.ln_2(x))


# ---- DVA ---------------------------------------------------------------------------------------

class DynamicValueAttention(Attention):
    """
    One head, and a value of its own for every pair of positions (arXiv 2512.22212, whose abstract
    gives no equations: these are this project's reading of it).

    From position i come a query q_i and a gate g_i, from position j a key k_j and a value u_j:

        s_ij = softmax over j <= i of q_i . k_j / sqrt(D)       strength of the pair
        v_ij = g_i * u_j                                        value of the pair, elementwise
        y_i  = W_o sum_j s_ij v_ij                              what the block adds to the stream

    All v_ij together would be a (T, T, M) tensor. It is never built: g_i does not depend on j, so
    it comes out of the sum, sum_j s_ij v_ij = g_i * sum_j s_ij u_j, and what is left is one
    ordinary attention. The norm (on by default) divides that sum by its size, which is one number
    for each query. So each pair keeps a value of its own: v_ij = (w * g_i / rms_i) * u_j.

    An open gate (gate="open", this project's own change) has 1 + g_i in the place of g_i: a value
    that all queries share, plus the change that each query makes. That change is small at the
    start of training, so the block begins close to ordinary attention.
    """

    def __init__(self, config, banked):
        C, D, M = config.n_embd, config.qk_dim, config.value_dim
        super().__init__(config, banked, n_head=1, qk_width=D, value_width=M)
        self.c_q = Linear(C, D, bias=config.bias)
        self.c_k = Linear(C, D, bias=config.bias)
        self.c_v = Linear(C, M, bias=config.bias) if not banked else None
        self.c_gate = Linear(C, M, bias=config.bias)
        self.norm = RMSNorm(M) if config.value_norm else nn.Identity()
        self.starts_open = config.gate == "open"
        if banked and config.value_norm:
            # The norm divides by the table's scale, so its gradient would be rounding noise
            self.bank.gamma.requires_grad_(False)

    def forward(self, x, idx, cache=None):
        """x (B, T, C), all token ids so far idx (B, S) -> (B, T, C)"""
        q, k, g = self.c_q(x), self.c_k(x), self.c_gate(x)
        if self.starts_open:
            g = 1 + g
        y = self.mix(q, k, self.c_v(x) if self.bank is None else None, idx, cache)
        return self.resid_dropout(self.c_proj(self.norm(y) * g))


class DVABlock(nn.Module):
    """x + attention(norm(x)), and no MLP; x is (B, T, C)."""

    def __init__(self, config, banked):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = DynamicValueAttention(config, banked)

    def forward(self, x, idx, cache=None):
        return x + self.attn(self.ln_1(x), idx, cache)


# ---- BoV ---------------------------------------------------------------------------------------

class BankOfValues(nn.Module):
    """
    Values looked up by token id (arXiv 2606.02780): u_p = gamma * E[token_p], with a table E
    (V, M) of one row per token, and one learnable number gamma per layer that scales the table.
    """

    def __init__(self, vocab_size, width):
        super().__init__()
        self.table = nn.Parameter(torch.empty(vocab_size, width))
        self.gamma = nn.Parameter(torch.ones(()))

    def forward(self, idx):
        """Token ids idx (B, S) -> values (B, S, M)"""
        return self.gamma * F.embedding(idx, self.table)

    @torch.no_grad()
    def align(self, embedding):
        """Start as the values that a fresh W_v would make of each token's embedding (V, C)."""
        w_v = embedding.new_empty(self.table.size(1), embedding.size(1)).normal_(std=0.02)
        self.table.copy_(F.layer_norm(embedding, embedding.shape[1:]) @ w_v.T)


# A block is built from (config, banked), and called with (x, idx, cache).
BLOCKS = {"gpt2": GPT2Block, "dva": DVABlock}


# ---- the whole model ---------------------------------------------------------------------------

class GPT(nn.Module):
    """
    A decoder-only transformer with GPT-2's parameter names. Raises ConfigError for settings that
    its block refuses, and for banks in a block that cannot hold one.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        V, C, L = config.vocab_size, config.n_embd, config.n_layer
        Block = BLOCKS[config.block]
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(V, C),
            wpe=nn.Embedding(config.block_size, C) if config.rotary != "only" else None,
            drop=nn.Dropout(config.dropout),
            h=nn.ModuleList(Block(config, layer >= L - config.bank_layers) for layer in range(L)),
            ln_f=nn.LayerNorm(C, bias=config.bias),
        ))
        self.lm_head = Linear(C, V, bias=False)
        # One table embeds the tokens and scores the next one (arXiv 1608.05859)
        self.transformer.wte.weight = self.lm_head.weight
        # All layers turn their queries and keys by one and the same table
        tables = {}
        for module in list(self.modules()):
            if isinstance(module, Attention) and module.rotary is not None:
                module.rotary = tables.setdefault(module.rotary.table.shape, module.rotary)
        if len(self.banks()) != config.bank_layers:
            raise ConfigError(f"bank_layers={config.bank_layers}: a block of the kind "
                              f"{config.block!r} cannot hold a bank; leave bank_layers out")
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """
        Embeddings and all matrices    N(0, 0.02)
        c_proj, which end a layer      N(0, 0.02 / sqrt(2 n_layer)): their sum keeps its size
        Biases and scales of norms     0 and 1
        Banks                          aligned with the token table
        """
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * self.config.n_layer))
            elif p.dim() >= 2:
                nn.init.normal_(p, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)
        for bank in self.banks():
            bank.align(self.transformer.wte.weight)

    def banks(self):
        """The BankOfValues of every layer that has one."""
        return [module for module in self.modules() if isinstance(module, BankOfValues)]

    def forward(self, idx, targets=None, cache=None, return_logits=True):
        """
        Token ids idx (B, T) and, if given, the token after each, targets (B, T), with -1 for
        those that do not count.

        Returns (logits (B, T, V), mean cross-entropy in nats), or without targets (logits of the
        last position (B, 1, V), None). With return_logits=False the logits are None: the loss
        alone needs far less memory. With a Cache, idx continues what the cache holds and is added
        to it. Raises ConfigError for more than block_size positions.
        """
        first = 0 if cache is None else cache.length
        end = first + idx.size(1)
        if end > self.config.block_size:
            raise ConfigError(f"{end} positions do not fit into "
                              f"block_size={self.config.block_size}")
        x = self.transformer.wte(idx)                                  # (B, T, C)
        if self.transformer.wpe is not None:
            x = x + self.transformer.wpe.weight[first:end]
        x = self.transformer.drop(x)
        if cache is not None:
            idx = cache.append_ids(idx)                                # (B, S)
        for block in self.transformer.h:
            x = block(x, idx, cache)
        x = self.transformer.ln_f(x)
        if cache is not None:
            cache.length = end
        if targets is None:
            return self.lm_head(x[:, -1:]), None
        if not return_logits:
            return None, head_loss(x, self.lm_head.weight, targets)
        logits = self.lm_head(x)                                       # (B, T, V)
        return logits, mean_loss(logits, targets)

    def num_params(self):
        """Numbers in the model. The token table counts once."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self):
        """
        FLOPs of training on one token of a full window: each matrix product once forward, at 2
        FLOPs per multiplication, and twice backward. All T x T pairs count; look-ups cost none.
        """
        products = sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))
        pairs = sum(m.multiplications_per_pair for m in self.modules() if isinstance(m, Attention))
        return 3 * 2 * (products + pairs * self.config.block_size)


# ---- the KV cache and generation ---------------------------------------------------------------

class Cache:
    """
    The KV cache: keys and values of the positions so far, so that a new token costs one position
    and not the whole text. A layer with a bank keeps no values: it looks them up by token id.
    """

    def __init__(self, size):
        self.size = size            # positions that there is room for
        self.length = 0             # positions before this call
        self.ids = None             # all token ids so far, those of this call included (B, S)
        self.keys = {}              # attention layer: (B, H, size, D)
        self.values = {}            # attention layer: (B, H, size, M / H)

    def append_ids(self, new):
        """Add the token ids of this call, new (B, T); return all ids so far, (B, S)."""
        self.ids = new if self.ids is None else torch.cat((self.ids, new), dim=1)
        return self.ids

    def append(self, store, layer, new):
        """Put new (B, H, T, N) after the past in store[layer]; return both, (B, H, S, N)."""
        if layer not in store:
            B, H, _, N = new.shape
            store[layer] = new.new_empty(B, H, self.size, N)
        end = self.length + new.size(2)
        store[layer].narrow(2, self.length, new.size(2)).copy_(new)
        return store[layer].narrow(2, 0, end)

    def repeat(self, times):
        """Make `times` copies of each row, one after another."""
        self.ids = self.ids.repeat_interleave(times, dim=0)
        for store in (self.keys, self.values):
            for layer in store:
                store[layer] = store[layer].repeat_interleave(times, dim=0)


@torch.inference_mode()
def stream(model, idx, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, stop_token=-1,
           num_tokens=None, num_samples=1):
    """
    Continue each row of idx (B, T), T >= 1, num_samples times, and yield the next ids
    (B num_samples, 1), one step after another.

    temperature, top_k and top_p: see `draw`. Only ids below num_tokens are drawn, since a
    padded table has rows that are no tokens. A row that drew stop_token goes on with it; when
    all rows have, the stream ends. Each row has a random generator of its own, seeded from
    torch's, so that a text does not depend on how many others are made with it. Raises
    FloatingPointError where the model's logits are not finite.

    Positions are learned, so a full window cannot slide. Its newer half becomes the prompt of
    the next one: a token sees between block_size / 2 and block_size others.
    """
    size, rows = model.config.block_size, idx.size(0) * num_samples
    generators = [torch.Generator().manual_seed(seed)
                  for seed in torch.randint(2**62, (rows,)).tolist()]
    stopped = torch.zeros(rows, 1, dtype=torch.bool, device=idx.device)
    new = idx[:, -size:]
    cache = Cache(min(size, new.size(1) + max_new_tokens))
    for step in range(max_new_tokens):
        if cache.length + new.size(1) > size:
            new = torch.cat((cache.ids, new), dim=1)[:, -max(1, size // 2):]
            cache = Cache(size)
        logits, _ = model(new, cache=cache)
        logits = logits[:, -1, :num_tokens]
        if step == 0:
            # The prompt went through the model once for all its samples
            cache.repeat(num_samples)
            logits = logits.repeat_interleave(num_samples, dim=0)
        uniform = torch.stack([torch.rand(1, generator=generator) for generator in generators])
        new = draw(logits, uniform.to(idx.device), temperature, top_k, top_p)
        if stop_token >= 0:
            new = new.masked_fill(stopped, stop_token)
            stopped |= new == stop_token
        yield new
        if stopped.all():
            return


def generate(model, idx, max_new_tokens=100, **options):
    """
    idx (B, T) with up to max_new_tokens more in each row; the options are stream's. In place of idx
    a model that load_model() made takes a text, and the text comes back with its continuation.
    """
    if isinstance(idx, str):
        tokenizer = getattr(model, "tokenizer", None)
        if tokenizer is None:
            raise TypeError("a text needs model.tokenizer, as load_model() sets it in "
                            "nanodva/weights.py; without it give token ids, a tensor (B, T)")
        if not idx:
            raise ValueError("the prompt is empty: give at least one character, such as a new line")
        ids = torch.tensor([tokenizer.encode(idx)], device=model.lm_head.weight.device)
        options = {"num_tokens": tokenizer.vocab_size} | options
        [row, *_] = generate(model, ids, max_new_tokens, **options).tolist()
        return tokenizer.decode(row).decode(errors="replace")
    rows = idx.repeat_interleave(options.get("num_samples", 1), dim=0)
    return torch.cat([rows, *stream(model, idx, max_new_tokens, **options)], dim=1)


def draw(logits, uniform, temperature=1.0, top_k=0, top_p=1.0):
    """
    One token id (B, 1) for each row of logits (B, V), chosen by uniform (B, 1), random numbers in
    [0, 1). Raises FloatingPointError for logits that are not finite.

    Temperature 0 takes the most probable token. top_k, if not 0, keeps the k most probable tokens.
    top_p below 1 is nucleus sampling (arXiv 1904.09751): it keeps the smallest set of the most
    probable tokens whose probabilities add up to top_p.
    """
    if not logits.amax(dim=-1).isfinite().all():
        raise FloatingPointError("the model's logits are not finite numbers: its weights are "
                                 "broken, or too large for the dtype")
    if temperature < 1e-5:                                             # a division would overflow
        return logits.argmax(dim=-1, keepdim=True)
    probs, ids = (logits.float() / temperature).softmax(dim=-1), None
    if top_k or top_p < 1:
        V = logits.size(-1)
        probs, ids = probs.topk(min(top_k or V, V))                    # (B, k), in falling order
    if top_p < 1:
        share = probs / probs.sum(dim=-1, keepdim=True)
        before = share.cumsum(dim=-1) - share                          # of more probable tokens
        probs = probs.masked_fill(before >= top_p, 0)
    # The token at which the running sum exceeds a random share of the whole. That takes one random
    # number; torch.multinomial draws V of them, which took 4 % to 8 % of a token's time.
    sums = probs.cumsum(dim=-1)
    place = torch.searchsorted(sums, uniform * sums[:, -1:], right=True)           # (B, 1)
    return place if ids is None else ids.gather(-1, place)


# ---- faster ways to the same numbers -----------------------------------------------------------

def attend(q, k, v, dropout=0.0):
    """
    Causal softmax attention: q (B, H, T, D), k (B, H, S, D), v (B, H, S, M) -> (B, H, T, M).
    The T queries stand at the newest of the S positions.

    torch has a fast kernel where keys and values are equally wide, on CUDA up to 256 channels.
    Elsewhere its own fallback takes longer than the explicit softmax, for long windows several
    times. On a CPU the explicit one wins for windows up to 256, too, except for a single query.
    """
    T, S, D, M, device = q.size(-2), k.size(-2), q.size(-1), v.size(-1), q.device.type
    has_kernel = D == M and (device != "cuda" or D <= 256)
    # torch's causal mask begins at the first key, so queries after a cache need their own
    if has_kernel and T in (1, S) and not (device == "cpu" and 1 < T <= 256):
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=T > 1)
    # Pieces of 128 are the widest that all fused kernels train, and take half of the softmax of 64.
    # At 124M they move 0.1 GB per layer, the explicit way 0.5 to 0.9. Arithmetic, not timed yet.
    width = 128 if M % 128 == 0 else 64
    fits = T == S > 1 and D <= width and M % width == 0 and dropout == 0
    if device == "cuda" and fits and q.dtype != torch.float32:
        return attend_in_pieces(q, k, v, width)
    return explicit_attention(q, k, v, dropout, rows=128 if device == "cpu" else T)


def explicit_attention(q, k, v, dropout=0.0, rows=128):
    """
    attend() as a textbook writes it, but for `rows` queries at a time: none of them sees the keys
    after the last of them, which saves almost half of the work in a long window.
    """
    T, S, mixed = q.size(-2), k.size(-2), []
    q = q / math.sqrt(q.size(-1))
    if T == 1:
        # A token of generation: what the loop does around the products would double its time
        strengths = F.dropout((q @ k.mT).softmax(dim=-1), dropout).to(v.dtype)
        return strengths @ v
    for first in range(0, T, rows):
        seen = S - T + first + rows                                    # slices end with the tensor
        scores = q[..., first:first + rows, :] @ k[..., :seen, :].mT   # (B, H, rows, seen)
        future = torch.full_like(scores[0, 0], -math.inf).triu(S - T + first + 1)
        scores = scores + future
        strengths = F.dropout(scores.softmax(dim=-1), dropout).to(v.dtype)
        mixed.append(strengths @ v[..., :seen, :])
    return torch.cat(mixed, dim=-2)


def attend_in_pieces(q, k, v, width=128):
    """
    attend() for a value that is too wide for a kernel: each piece of `width` channels becomes the
    value of a head of its own, and all heads share their queries and keys. q, k (B, H, T, D) with
    D up to `width`, v (B, H, T, M) -> (B, H, T, M). Dropout would differ from piece to piece.
    """
    B, _, _, D = q.shape
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))                     # (B H, T, D or M)
    v = v.unflatten(-1, (-1, width)).transpose(1, 2)                   # (B H, pieces, T, width)
    # Zeros make queries and keys as wide as a piece; expand() repeats them without a copy
    q, k = (F.pad(x, (0, width - D))[:, None].expand(-1, v.size(1), -1, -1) for x in (q, k))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1 / math.sqrt(D))
    return y.transpose(1, 2).flatten(2).unflatten(0, (B, -1))          # (B, H, T, M)


def mean_loss(logits, targets):
    """
    Mean cross-entropy in nats of logits (B, T, V) over the targets (B, T) that are not -1; 0 where
    all of them are.
    """
    total = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1,
                            reduction="sum")
    return total / (targets >= 0).sum().clamp(min=1)


def head_loss(x, weight, targets):
    """
    mean_loss() of the logits x W^T, x (B, T, C) and W (V, C), without keeping them. Where V is much
    larger than C, all logits together would be most of a training step's memory.
    """
    if weight.size(0) < 8 * weight.size(1):
        return mean_loss(F.linear(x, weight), targets)
    device, dtype = x.device.type, x.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    total = HeadLoss.apply(x.flatten(0, 1), weight, targets.flatten(), dtype,
                           torch.is_grad_enabled())
    return total / (targets >= 0).sum().clamp(min=1)


class HeadLoss(torch.autograd.Function):
    """
    The summed cross-entropy of the logits x W^T, from x (N, C), W (V, C) and targets (N), for 512
    rows at a time. The gradients need the same logits, so they are made with them: that spares the
    second product of a recomputation. Products are in `dtype`, the loss and sums in float32.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, dtype, with_gradients):
        total, dx, dw = x.new_zeros((), dtype=torch.float32), None, None
        if with_gradients:
            dx, dw = torch.empty_like(x), torch.zeros_like(weight)
        narrow = weight.to(dtype)
        # One buffer, changed in place: fresh pages for each chunk would take longer than its exp
        buffer = x.new_empty(min(512, len(x)), len(weight), dtype=dtype)
        for rows in range(0, len(x), 512):
            rows = slice(rows, rows + 512)
            h, counts = x[rows].to(dtype), targets[rows, None] >= 0    # (512, C), (512, 1)
            target = targets[rows, None].clamp(min=0)
            logits = torch.mm(h, narrow.T, out=buffer[:len(h)]).float()            # (512, V)
            top, right = logits.amax(dim=-1, keepdim=True), logits.gather(1, target)
            exps = logits.sub_(top).exp_()
            sums = exps.sum(dim=-1, keepdim=True)
            total += ((sums.log() + top - right) * counts).sum()
            if with_gradients:
                # Of the loss by the logits: their softmax, less 1 at the target
                d = exps.mul_(counts / sums).scatter_add_(1, target, -counts.float()).to(dtype)
                dx[rows] = d @ narrow
                dw = dw.addmm_(d.T, h) if dtype == dw.dtype else dw.add_(d.T @ h)
        ctx.save_for_backward(dx, dw)
        return total

    @staticmethod
    def backward(ctx, upstream):
        dx, dw = ctx.saved_tensors
        return dx.mul_(upstream), dw.mul_(upstream), None, None, None


class Linear(nn.Linear):
    """
    nn.Linear, x (..., K) -> (..., N). A large matrix times a single row, as in generation, takes
    the time of reading the matrix. On an AMD EPYC torch reads it at 12 GB/s in one product, and at
    20 to 27 as a batch of two, its upper and its lower half: at 124M 0.6 of a token's time.
    """

    def forward(self, x):
        N, K = self.out_features, self.in_features
        if N * K < 2**16 or x.numel() > K or x.device.type != "cpu" or x.dtype != torch.float32:
            return super().forward(x)
        halves = self.weight[:N // 2 * 2].view(2, -1, K)               # (2, N / 2, K)
        # A column with the strides of a transposed row: with those of a plain one it is slow
        column = x.view(1, 1, K).mT.expand(2, K, 1)
        y = torch.bmm(halves, column).view(*x.shape[:-1], -1)          # (..., N)
        if N % 2:
            y = torch.cat((y, x @ self.weight[-1:].T), dim=-1)
        return y if self.bias is None else y + self.bias


class RMSNorm(nn.Module):
    """
    x (..., M) over the root of its mean square, times a weight (arXiv 1910.07467), in x's type.
    By way of the vector's length training takes two thirds of the time of torch's own on a CPU at
    GPT-2's width. Without gradients torch's takes half of this one's time for a single row.
    """

    def __init__(self, width, eps=1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x):
        if not torch.is_grad_enabled():
            return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps).to(x.dtype)
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = torch.rsqrt(length ** 2 / x.size(-1) + self.eps)       # (..., 1)
        return x * scale.to(x.dtype) * self.weight.to(x.dtype)
