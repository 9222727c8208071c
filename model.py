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
    value_norm: bool = True      # dva: RMSNorm on the weighted sum of the values
    bank_layers: int = 0         # the last N layers have a Bank of Values; the paper: a third

    def __post_init__(self):
        least = dict(block_size=1, vocab_size=1, n_layer=1, n_head=1, n_embd=1, qk_dim=1,
                     value_dim=0, bank_layers=0, dropout=0)
        choices = dict(block=list(BLOCKS), gelu=["exact", "tanh"],
                       rotary=[True, False, "only", "auto"])
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

    @property
    def is_rotary(self):
        """Whether queries and keys are rotated by their positions."""
        return self.block != "gpt2" if self.rotary == "auto" else bool(self.rotary)

    @property
    def has_learned_positions(self):
        """Whether a learned vector for each position is added to the token embeddings."""
        return self.rotary != "only"

    @property
    def value_width(self):
        """The width M of a dva block's values and gates."""
        return self.value_dim or self.n_embd


# ---- what both kinds of attention share --------------------------------------------------------

def rotary_table(block_size, width):
    """
    The cosines and sines of rotary positions (arXiv 2104.09864), (2, block_size, width): position
    p rotates the pair of channels (c, c + width/2) by the angle p / 10000^(2c / width).
    """
    half = width // 2
    speed = 10000.0 ** (-torch.arange(half) / half)                    # radians per position
    angle = torch.arange(block_size)[:, None] * speed                  # (block_size, width / 2)
    cos, sin = angle.cos(), angle.sin()
    return torch.stack((torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)))


def rotate(x, rotary):
    """
    Rotate the pairs of channels of queries or keys x (..., T, D) by the rows of a rotary_table for
    their T positions, rotary (2, T, D). The product of a rotated query and a rotated key then
    depends on the distance between their positions, not on the positions themselves.
    """
    cos, sin = (part.to(x.dtype) for part in rotary)
    return x * cos + x.roll(x.size(-1) // 2, dims=-1) * sin


def explicit_attention(q, k, v, dropout=0.0):
    """
    Causal softmax attention as in a textbook: q (B, H, T, D), k (B, H, S, D), v (B, H, S, M) ->
    (B, H, T, M). The T queries are at the last T of the S positions. Scores are float32 until the
    softmax, as in torch's fused kernels. attend() gives the same numbers faster.
    """
    T, S, at_least_float32 = q.size(-2), k.size(-2), torch.promote_types(q.dtype, torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        q, k = q.to(at_least_float32) / math.sqrt(q.size(-1)), k.to(at_least_float32)
        scores = q @ k.mT                                              # (B, H, T, S)
    future = torch.full_like(scores[0, 0], -math.inf).triu(S - T + 1)
    weights = F.dropout((scores + future).softmax(dim=-1), dropout)
    return weights.to(v.dtype) @ v


class Attention(nn.Module):
    """
    What both kinds of attention share: W_q, W_k and W_v or a Bank of Values, heads, rotary
    positions, the KV cache, one causal softmax, and W_o, which projects back into the stream.

    qk_width and value_width count the channels of all heads together. Raises ConfigError if they
    do not divide into heads, or if a rotated head has an odd number of channels.
    """

    def __init__(self, config, layer, n_head, qk_width, value_width):
        super().__init__()
        C, self.n_head, self.dropout = config.n_embd, n_head, config.dropout
        banked = layer >= config.n_layer - config.bank_layers
        if qk_width % n_head or value_width % n_head:
            raise ConfigError(f"n_embd={C} does not divide into n_head={n_head} heads: choose an "
                              f"n_head that divides it")
        if config.is_rotary and qk_width // n_head % 2:
            setting = f"n_head={n_head}" if n_head > 1 else f"qk_dim={qk_width}"
            raise ConfigError(f"{setting}: rotary positions rotate pairs of channels, but a query "
                              f"has {qk_width // n_head}: make that number even, or choose "
                              f"--rotary=False")
        self.bank = BankOfValues(config.vocab_size, value_width) if banked else None
        self.c_proj = nn.Linear(value_width, C, bias=config.bias)
        self.c_q = nn.Linear(C, qk_width, bias=config.bias)
        self.c_k = nn.Linear(C, qk_width, bias=config.bias)
        self.c_v = None if banked else nn.Linear(C, value_width, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def values(self, x, idx, cache):
        """
        The values u of all positions so far, (B, S, M): W_v x for x (B, T, C), after those in the
        cache; or the bank's rows for all token ids so far, idx (B, S).
        """
        if self.bank is not None:
            return self.bank(idx)
        u = self.c_v(x)
        return u if cache is None else cache.append(cache.values, self, u)

    def mix(self, q, k, u, rotary, cache):
        """
        For each query the sum of the values, weighted by a softmax over all keys up to its own
        position: q, k (B, T, H D), u (B, S, M), rotary as in rotate() or None -> (B, T, M).
        """
        q, k, u = (x.unflatten(-1, (self.n_head, -1)).transpose(1, 2) for x in (q, k, u))
        if rotary is not None:
            q, k = rotate(torch.stack((q, k)), rotary)                 # (B, H, T, D)
        if cache is not None:
            k = cache.append(cache.keys, self, k)                      # (B, H, S, D)
        y = attend(q, k, u, self.dropout if self.training else 0.0)    # (B, H, T, M / H)
        return y.transpose(1, 2).flatten(2)


# ---- GPT-2 -------------------------------------------------------------------------------------

class CausalSelfAttention(Attention):
    """GPT-2's attention: several heads, and one value for each key, which all queries share."""

    def __init__(self, config, layer):
        C = config.n_embd
        super().__init__(config, layer, config.n_head, qk_width=C, value_width=C)

    def forward(self, x, idx, rotary, cache=None):
        """x (B, T, C), all token ids so far idx (B, S), rotary of rotate() -> (B, T, C)"""
        q, k, u = self.c_q(x), self.c_k(x), self.values(x, idx, cache)
        y = self.mix(q, k, u, rotary, cache)
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
        return self.dropout(self.c_proj(self.gelu(self.c_fc(x))))


class GPT2Block(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)); x is (B, T, C)."""
    attention = CausalSelfAttention

    def __init__(self, config, layer):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = self.attention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, idx, rotary, cache=None):
        x = x + self.attn(self.ln_1(x), idx, rotary, cache)
        return x + self.mlp(self.ln_2(x))


# ---- DVA ---------------------------------------------------------------------------------------

class RMSNorm(nn.RMSNorm):
    """torch's, x (..., M) -> (..., M), with the weight in x's type: autocast leaves it float32."""

    def forward(self, x):
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class DynamicValueAttention(Attention):
    """
    One head, and a value of its own for every pair of positions (arXiv 2512.22212, whose abstract
    gives no equations: these are this project's reading of it).

    Position i gives a query q_i and a gate g_i, position j a key k_j and a value u_j:

        s_ij = softmax over j <= i of q_i . k_j / sqrt(D)       attention weight of the pair
        v_ij = g_i * u_j                                        value of the pair, elementwise
        y_i  = W_o sum_j s_ij v_ij                              what the block adds to the stream

    All v_ij together would be a (T, T, M) tensor. It is never built: g_i does not depend on j, so
    it can be taken out of the sum, sum_j s_ij v_ij = g_i * sum_j s_ij u_j. What is left is one
    ordinary attention. The norm (on by default) divides this sum by its root mean square, one
    number per query. So each pair keeps a value of its own: v_ij = (w * g_i / rms_i) * u_j.
    """

    def __init__(self, config, layer):
        C, D, M = config.n_embd, config.qk_dim, config.value_width
        super().__init__(config, layer, n_head=1, qk_width=D, value_width=M)
        self.c_gate = nn.Linear(C, M, bias=config.bias)
        self.norm = RMSNorm(M, eps=1e-5) if config.value_norm else nn.Identity()
        if self.bank is not None and config.value_norm:
            # The norm cancels any common scale, so gamma's gradient would be rounding noise
            self.bank.gamma.requires_grad_(False)

    def forward(self, x, idx, rotary, cache=None):
        """x (B, T, C), all token ids so far idx (B, S), rotary of rotate() -> (B, T, C)"""
        q, k, u = self.c_q(x), self.c_k(x), self.values(x, idx, cache)
        g = self.c_gate(x)
        y = self.norm(self.mix(q, k, u, rotary, cache)) * g
        return self.resid_dropout(self.c_proj(y))


class DVABlock(nn.Module):
    """x + attention(norm(x)), and no MLP; x is (B, T, C)."""
    attention = DynamicValueAttention

    def __init__(self, config, layer):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = self.attention(config, layer)

    def forward(self, x, idx, rotary, cache=None):
        return x + self.attn(self.ln_1(x), idx, rotary, cache)


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
        """Set row t to W_v norm(e_t), for token embeddings e (V, C) and a W_v sampled for it."""
        w_v = embedding.new_empty(self.table.size(1), embedding.size(1)).normal_(std=0.02)
        self.table.copy_(F.layer_norm(embedding, embedding.shape[1:]) @ w_v.T)


# A block is made from (config, layer), layer 0 first, and called with (x, idx, rotary, cache).
BLOCKS = {"gpt2": GPT2Block, "dva": DVABlock}


# ---- the whole model ---------------------------------------------------------------------------

class GPT(nn.Module):
    """
    A decoder-only transformer with GPT-2's parameter names, except that W_q, W_k and W_v are three
    matrices in both blocks. Raises ConfigError for settings that its block refuses, and for banks
    in a block that cannot hold one.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        V, C, L = config.vocab_size, config.n_embd, config.n_layer
        Block = BLOCKS[config.block]
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(V, C),
            wpe=nn.Embedding(config.block_size, C) if config.has_learned_positions else None,
            drop=nn.Dropout(config.dropout),
            h=nn.ModuleList(Block(config, layer) for layer in range(L)),
            ln_f=nn.LayerNorm(C, bias=config.bias),
        ))
        self.lm_head = nn.Linear(C, V, bias=False)
        # One table embeds the tokens and scores the next one (arXiv 1608.05859)
        self.transformer.wte.weight = self.lm_head.weight
        widths = {attn.c_q.out_features // attn.n_head for attn in self.attentions()}
        if config.is_rotary and len(widths) > 1:
            raise ConfigError(f"the heads of this model's layers are {sorted(widths)} channels "
                              f"wide, and rotary positions need one width for all of them")
        table = rotary_table(config.block_size, *widths) if config.is_rotary and widths else None
        self.register_buffer("rotary", table, persistent=False)        # (2, block_size, D)
        if len(self.banks()) != config.bank_layers:
            raise ConfigError(f"bank_layers={config.bank_layers}: a block of the kind "
                              f"{config.block!r} cannot hold a bank; leave bank_layers out")
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """
        Embeddings and all matrices    normal, standard deviation 0.02
        c_proj, which end a layer      0.02 / sqrt(2 n_layer): as in GPT-2, which has two a layer
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

    def attentions(self):
        """The Attention of every layer that has one."""
        return [module for module in self.modules() if isinstance(module, Attention)]

    def banks(self):
        """The BankOfValues of every layer that has one."""
        return [module for module in self.modules() if isinstance(module, BankOfValues)]

    def forward(self, idx, targets=None, cache=None, last_only=False):
        """
        Token ids idx (B, T) -> logits (B, T, V), or with last_only those of the last position,
        (B, 1, V). With targets (B, T), the token after each, -1 for those that do not count: the
        mean cross-entropy in nats instead, a scalar. It needs far less memory than all logits.

        With a Cache, idx continues the text in the cache and is added to it. Raises ConfigError
        for more than block_size positions.
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
        rotary = None if self.rotary is None else self.rotary[:, first:end]            # (2, T, D)
        if cache is not None:
            idx = cache.append_ids(idx)                                # (B, S)
        for block in self.transformer.h:
            x = block(x, idx, rotary, cache)
        if cache is not None:
            cache.length = end
        x = self.transformer.ln_f(x[:, -1:] if last_only else x)
        if targets is not None:
            return head_loss(x, self.lm_head.weight, targets)
        return self.lm_head(x)

    def num_params(self):
        """Number of parameters; the tied token table counts once."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self):
        """
        FLOPs of training on one token of a full window: each matrix product once forward, at 2
        FLOPs per multiplication, and twice backward. All T x T pairs count; look-ups cost none.
        """
        products = sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))
        pairs = sum(a.c_q.out_features + a.c_proj.in_features for a in self.attentions())
        return 3 * 2 * (products + pairs * self.config.block_size)


# ---- the KV cache and generation ---------------------------------------------------------------

class Cache:
    """
    The KV cache: keys and values of the positions so far, so a new token costs one position and
    not the whole text. A layer with a bank keeps no values: it looks them up by token id.
    """

    def __init__(self, size):
        self.size = size            # the most positions it can hold
        self.length = 0             # positions before this call
        self.ids = None             # all token ids so far, those of this call included (B, S)
        self.keys = {}              # attention layer: (B, H, size, D)
        self.values = {}            # attention layer: (B, size, M)

    def append_ids(self, new):
        """Add the token ids of this call, new (B, T); return all ids so far, (B, S)."""
        self.ids = new if self.ids is None else torch.cat((self.ids, new), dim=1)
        return self.ids

    def append(self, store, layer, new):
        """Put new (..., T, N) after the past in store[layer]; return both, (..., S, N)."""
        if layer not in store:
            store[layer] = new.new_empty(*new.shape[:-2], self.size, new.size(-1))
        store[layer].narrow(-2, self.length, new.size(-2)).copy_(new)
        return store[layer].narrow(-2, 0, self.length + new.size(-2))


@torch.inference_mode()
def stream(model, idx, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, stop_token=-1,
           num_tokens=None):
    """
    Continue each row of idx (B, T), T >= 1, and yield the next ids (B, 1), one step after another.

    temperature, top_k and top_p: see sample_token. Ids from num_tokens on are padding and are never
    sampled. A row that has produced stop_token repeats it; generation ends when every row has. Each
    row has its own random generator, seeded from torch's, so a text does not depend on the number
    of rows. Raises FloatingPointError for logits that are not finite.

    Cached keys belong to fixed positions, so a full window cannot slide: its newer half becomes the
    prompt of the next one, and from then on a token sees at least block_size / 2 positions.
    """
    size = model.config.block_size
    generators = [torch.Generator().manual_seed(seed)
                  for seed in torch.randint(2**62, (len(idx),)).tolist()]
    stopped = torch.zeros_like(idx[:, :1], dtype=torch.bool)
    new = idx[:, -size:]
    cache = Cache(min(size, new.size(1) + max_new_tokens))
    for _ in range(max_new_tokens):
        if cache.length + new.size(1) > size:
            new = torch.cat((cache.ids, new), dim=1)[:, -max(1, size // 2):]
            cache = Cache(size)
        logits = model(new, cache=cache, last_only=True)[:, -1, :num_tokens]
        uniform = torch.stack([torch.rand(1, generator=generator) for generator in generators])
        new = sample_token(logits, uniform.to(idx.device), temperature, top_k, top_p)
        if stop_token >= 0:
            new = new.masked_fill(stopped, stop_token)
            stopped |= new == stop_token
        yield new
        if stopped.all():
            return


def generate(model, idx, max_new_tokens=100, num_samples=1, **options):
    """
    Token ids idx (B, T) -> each row num_samples times, with up to max_new_tokens more; the options
    are stream's. For a model with a tokenizer, as load_model() in nanodva/weights.py returns it,
    idx may be a text: the result is the text and its continuation, or a list of num_samples texts.
    """
    if isinstance(idx, str):
        if not idx:
            raise ValueError("the prompt is empty: give at least one character, such as a new line")
        ids = torch.tensor([model.tokenizer.encode(idx)]).to(model.transformer.wte.weight.device)
        options = {"num_tokens": model.tokenizer.vocab_size} | options
        rows = generate(model, ids, max_new_tokens, num_samples, **options).tolist()
        texts = [model.tokenizer.decode(row).decode(errors="replace") for row in rows]
        return texts if num_samples > 1 else texts[0]
    rows = idx.repeat_interleave(num_samples, dim=0)
    return torch.cat([rows, *stream(model, rows, max_new_tokens, **options)], dim=1)


def sample_token(logits, uniform, temperature=1.0, top_k=0, top_p=1.0):
    """
    Sample one token id (B, 1) for each row of logits (B, V) with uniform (B, 1), random numbers in
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
    # The first token at which the running sum exceeds a uniform share of the total
    sums = probs.cumsum(dim=-1)
    place = torch.searchsorted(sums, uniform * sums[:, -1:], right=True)           # (B, 1)
    return place if ids is None else ids.gather(-1, place)


# ---- faster ways to the same numbers: a first reading can stop here ----------------------------

def attend(q, k, v, dropout=0.0):
    """
    explicit_attention() by the fastest way:

        keys and values equally wide (CUDA: up to 256 channels)    torch's fused kernel
        CUDA, one head, no dropout, D a divisor of M               the kernel, by attend_in_heads
        everything else                                            explicit_attention
    """
    if torch.compiler.is_exporting():                                  # for any T, so without ifs
        return explicit_attention(q, k, v, dropout)
    T, S, D, M, is_cpu = q.size(-2), k.size(-2), q.size(-1), v.size(-1), q.device.type == "cpu"
    # torch's causal mask begins at the first key, so queries after a cache need their own
    if T in (1, S) and D == M and (is_cpu or D <= 256):
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=T > 1)
    if not is_cpu:
        one_head = q.size(1) == 1 and D <= 256 and M % D == 0
        if T in (1, S) and q.device.type == "cuda" and one_head and dropout == 0:
            return attend_in_heads(q, k, v)
        return explicit_attention(q, k, v, dropout)
    # 128 queries at a time: their weights stay in a CPU's cache, and they need no keys after the
    # last of them, which saves almost half of the work in a long window
    mixed = []
    for first in range(0, T, 128):
        seen = S - T + first + 128                                     # slices end with the tensor
        mixed.append(explicit_attention(q[..., first:first + 128, :], k[..., :seen, :],
                                        v[..., :seen, :], dropout))
    return torch.cat(mixed, dim=-2)


def attend_in_heads(q, k, v):
    """
    attend() of one head with a value too wide for a kernel: each group of D of its M channels
    becomes the value of a head, and these heads share the queries and keys. Forward and backward
    of one layer of 124M took 0.82 ms on an H100, explicit_attention 1.50.
    """
    heads = v.size(-1) // q.size(-1)
    v = v[:, 0].unflatten(-1, (heads, -1)).transpose(1, 2)             # (B, M / D, S, D)
    q, k = (x.expand(-1, heads, -1, -1) for x in (q, k))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=q.size(-2) > 1)
    return y.transpose(1, 2).flatten(2)[:, None]                       # (B, 1, T, M)


def mean_loss(logits, targets):
    """Mean cross-entropy in nats of logits (B, T, V) over the targets (B, T) that are not -1."""
    total = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1,
                            reduction="sum")
    return total / (targets != -1).sum().clamp(min=1)


def head_loss(x, weight, targets):
    """
    mean_loss() of the logits x W^T, x (B, T, C) and W (V, C), without keeping them. If V is much
    larger than C, all logits together would be most of a training step's memory.
    """
    if weight.size(0) < 8 * weight.size(1):
        return mean_loss(F.linear(x, weight), targets)
    device, dtype = x.device.type, x.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    rows = 512 if device == "cpu" else 4096            # each chunk reads and writes all of dw
    total = HeadLoss.apply(x.flatten(0, 1), weight, targets.flatten(), dtype, rows,
                           torch.is_grad_enabled())
    return total / (targets != -1).sum().clamp(min=1)


class HeadLoss(torch.autograd.Function):
    """
    The summed cross-entropy of the logits x W^T, from x (N, C), W (V, C) and targets (N), `rows`
    of them at a time. The gradients are computed together with the logits, which saves recomputing
    them in the backward pass. Products are in `dtype`, the loss and sums in float32.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, dtype, rows, with_gradients):
        total, dx, dw = x.new_zeros((), dtype=torch.float32), None, None
        if with_gradients:
            dx, dw = torch.empty_like(x), torch.zeros_like(weight)
        narrow = weight.to(dtype)
        # One buffer for all chunks: page faults for a new one each time would take longer than exp
        buffer = x.new_empty(min(rows, len(x)), len(weight), dtype=dtype)
        for first in range(0, len(x), rows):
            chunk = slice(first, first + rows)
            h, counts = x[chunk].to(dtype), targets[chunk, None] != -1             # (rows, 1)
            target = targets[chunk, None].where(counts, 0)
            logits = torch.mm(h, narrow.T, out=buffer[:len(h)]).float()            # (rows, V)
            top, right = logits.amax(dim=-1, keepdim=True), logits.gather(1, target)
            probs = logits.sub_(top).exp_()
            sums = probs.sum(dim=-1, keepdim=True)
            total += ((sums.log() + top - right) * counts).sum()
            if with_gradients:
                # The loss by the logits: their softmax, less 1 at the target
                probs *= counts / sums
                probs.scatter_add_(1, target, -counts.float())
                d = probs.to(dtype)
                dx[chunk] = d @ narrow
                if dtype == dw.dtype:
                    dw.addmm_(d.T, h)              # without a copy of dw: 6 % of a step at 124M
                else:
                    dw += d.T @ h
        ctx.save_for_backward(dx, dw)
        return total

    @staticmethod
    def backward(ctx, upstream):
        if torch.is_grad_enabled():
            raise RuntimeError("this loss has no second derivatives (create_graph=True): take "
                               "mean_loss(model(idx), targets) under sdpa_kernel(SDPBackend.MATH)")
        dx, dw = ctx.saved_tensors
        return dx.mul_(upstream), dw.mul_(upstream), None, None, None, None
