"""
See it think: one HTML page that shows what each token of a text gave to each prediction, exactly.

    python -m tools.explain --out_dir=out-demo --start="ROMEO:"
    python -m tools.explain --out_dir=out-demo --start=FILE:scene.txt --against=out-demo-gpt2

The strengths s, the gates g and the scales of the norms follow from the whole text. Once they are
computed and held fixed, the rest of the network only adds, and multiplies by matrices. So the
embedding of one token can go through it alone. What comes out is that token's part of the logit,
and the parts of all tokens add up to the logit.

Letters in shapes: T positions, C n_embd, H heads, M value_dim, L layers, V tokens; N parts of the
stream, which go through side by side; K logits that are explained at each position.
"""
import base64
import json
import math
import unicodedata
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from model import ModelConfig, rotate, stream
from nanodva.errors import fail, replacing, run_script
from nanodva.settings import check, load_settings
from nanodva.tokenizer import same_tokenizer
from nanodva.weights import build_model, read_weights
from sample import encode_prompt, find_tokenizer, read_prompt

TEMPLATE = Path(__file__).with_suffix(".html")
CANDIDATES = 10
MOST_TOKENS = 512
# What a page may take, and what it takes for a number of each kind where the model is trained
MOST_BYTES = 5e6
BYTES = {"parts": 0.6, "looks": 0.13, "strengths": 0.5, "values": 1.35, "figures": 5}


@dataclass
class ExplainConfig:
    out_dir: str = "out"            # the run's folder, or what else sample.py's init_from takes
    against: str = ""               # another run, to see which of the two expected each token
    start: str = "\n"               # prompt, FILE:text.txt, or - for standard input
    max_new_tokens: int = -1        # tokens that the model adds; -1: 120 to a prompt, 0 to a file
    temperature: float = 0.8        # 1: as the model says; lower: safer; 0: always the likeliest
    seed: int = 1337                # the same seed gives the same text
    dest: str = ""                  # file to write; by default explain.html in out_dir
    dataset: str = ""               # the one whose alphabet nanoGPT's weights take
    data_dir: str = "data"          # where data sets live

    def __post_init__(self):
        check(self, least=dict(max_new_tokens=-1, temperature=0, seed=0))


# ---- the network with strengths, gates and scales held -----------------------------------------

@dataclass
class Parts:
    """N parts of the residual stream at the newest T positions. Together they are all of it."""
    stream: torch.Tensor            # (N, T, C)
    biases: torch.Tensor            # (N, 1, 1)  1 where the biases belong to the part, else 0
    rows: torch.Tensor              # (N, T, 1)  1 where a bank's row belongs to it, else 0

    @classmethod
    def whole(cls, x):
        """The one part that is everything: the stream x (T, C), the biases, the banks' rows."""
        return cls(x[None], torch.ones(1, 1, 1), torch.ones(1, len(x), 1))


def linear(x, weight, bias, parts):
    """x W^T + b, where b counts for the parts that have the biases."""
    return x @ weight.T if bias is None else x @ weight.T + parts.biases * bias


def normalized(x, norm, scale, parts):
    """LayerNorm of x (N, T, C), whose scale 1 / sqrt(variance), (T, 1), is held."""
    x = (x - x.mean(dim=-1, keepdim=True)) * scale * norm.weight
    return x if norm.bias is None else x + parts.biases * norm.bias


def norm_scale(x):
    """What a LayerNorm multiplies x (T, C) by: 1 / sqrt(variance), (T, 1)."""
    return torch.rsqrt(x.var(dim=-1, correction=0, keepdim=True) + 1e-5)


def pair_strengths(q, k, attn):
    """s_ij = softmax over j <= i of R_i q_i . R_j k_j / sqrt(D); q, k (T, H D) -> (H, T, T)"""
    T = len(q)
    q, k = (x.unflatten(-1, (attn.n_head, -1)).transpose(0, 1) for x in (q, k))    # (H, T, D)
    if attn.angles is not None:
        q, k = rotate(q, attn.angles[:, :T]), rotate(k, attn.angles[:, :T])
    scores = q @ k.mT / math.sqrt(q.size(-1))
    later = torch.ones(T, T, dtype=torch.bool).triu(1)
    return scores.masked_fill(later, -math.inf).softmax(dim=-1)


class HeldAttention:
    """
    One layer's attention to a text, its strengths (H, T, T) and gate (T, M) held fixed:
    y_i = W_o [ sum_j s_ij u_j * gate_i ]. `value` is W_v with its bias, None under a bank.
    """

    def __init__(self, block, x, idx, q, k, value):
        self.attn, self.ln_1, self.value = block.attn, block.ln_1, value
        self.scale = norm_scale(x)
        self.strengths = pair_strengths(q, k, block.attn)
        self.bank_rows = block.attn.bank(idx) if value is None else None           # (T, M)
        self.u = self.values(Parts.whole(x))[0]                                    # (T, M)
        self.gate = torch.ones_like(self.u)
        self.mlp_wrote = torch.zeros_like(x)                                       # (T, C)

    def values(self, parts, first=0):
        """u_j = W_v x_j, or the row of the bank for token j: (N, T, M)"""
        if self.value is None:
            return parts.rows * self.bank_rows[first:]
        x = normalized(parts.stream, self.ln_1, self.scale[first:], parts)
        return linear(x, *self.value, parts)

    def mix(self, u, first=0):
        """sum_j s_ij u_j, for each head its own channels: (N, T, M) -> (N, T, M)"""
        u = u.unflatten(-1, (self.attn.n_head, -1)).transpose(1, 2)                # (N, H, T, m)
        return (self.strengths[:, first:, first:] @ u).transpose(1, 2).flatten(2)

    def attend(self, parts, first=0):
        """What attention adds to each part of the stream at positions from `first` on: (N, T, C)"""
        mixed = self.mix(self.values(parts, first), first) * self.gate[first:]
        return linear(mixed, self.attn.c_proj.weight, self.attn.c_proj.bias, parts)

    def looks(self, readout):
        """What i's look at j wrote, as the readouts (T, K, C) read it: (T, K, T) over i, k, j"""
        read = (readout @ self.attn.c_proj.weight) * self.gate[:, None]            # (T, K, M)
        read, u = (x.unflatten(-1, (self.attn.n_head, -1)) for x in (read, self.u))
        return torch.einsum("ikhm,jhm,hij->ikj", read, u, self.strengths)


class HeldDVA(HeldAttention):
    """DVA's block: v_ij = (w * g_i / rms_i) * u_j, so the gate that is held is w * g_i / rms_i."""

    def __init__(self, block, x, idx):
        n, attn = block.ln_1(x), block.attn
        value = None if attn.bank is not None else (attn.c_v.weight, attn.c_v.bias)
        super().__init__(block, x, idx, attn.c_q(n), attn.c_k(n), value)
        self.gate = attn.c_gate(n)
        if isinstance(attn.norm, torch.nn.Identity):
            return
        mean_square = self.mix(self.u[None])[0].square().mean(dim=-1, keepdim=True)
        self.gate = self.gate * attn.norm.weight * torch.rsqrt(mean_square + attn.norm.eps)

    def write(self, parts, first=0):
        """What the block adds to each part of the stream: (N, T, C)"""
        return self.attend(parts, first)


class HeldGPT2(HeldAttention):
    """GPT-2's block. gelu(z) = z * gate(z), and that gate of the MLP is held, too."""

    def __init__(self, block, x, idx):
        C = x.size(-1)
        weight, bias = block.attn.c_attn.weight, block.attn.c_attn.bias
        q, k, *v = block.attn.c_attn(block.ln_1(x)).split(C, dim=-1)
        value = (weight[2 * C:], None if bias is None else bias[2 * C:]) if v else None
        super().__init__(block, x, idx, q, k, value)
        self.ln_2, self.mlp = block.ln_2, block.mlp
        whole = Parts.whole(x)
        x = x + self.attend(whole)[0]
        self.scale_2 = norm_scale(x)
        z = self.mlp.c_fc(block.ln_2(x))                                           # (T, 4 C)
        if self.mlp.gelu.approximate == "tanh":
            self.mlp_gate = (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z ** 3))) / 2
        else:
            self.mlp_gate = (1 + torch.erf(z / math.sqrt(2))) / 2
        self.mlp_wrote = self.think(x[None], whole)[0]

    def think(self, x, parts, first=0):
        """What the MLP adds to each part x (N, T, C) of its input."""
        x = normalized(x, self.ln_2, self.scale_2[first:], parts)
        z = linear(x, self.mlp.c_fc.weight, self.mlp.c_fc.bias, parts) * self.mlp_gate[first:]
        return linear(z, self.mlp.c_proj.weight, self.mlp.c_proj.bias, parts)

    def write(self, parts, first=0):
        """What the block adds to each part of the stream: (N, T, C)"""
        attended = self.attend(parts, first)
        return attended + self.think(parts.stream + attended, parts, first)


HELD = {"dva": HeldDVA, "gpt2": HeldGPT2}


def hold(model, idx):
    """
    (layers, x): each layer of the model held as it is for the token ids idx (T), and the stream
    (T, C) behind the last. Raises UserError for a block that is not in HELD, or not as it was.
    """
    kind = model.config.block
    if kind not in HELD:
        fail(f"block={kind!r}: tools/explain.py can hold {' and '.join(HELD)}; write a class like "
             f"HeldDVA for this one, and name it in HELD")
    x, layers = model.transformer.wte(idx) + model.positions(0, len(idx)), []
    for block in model.transformer.h:
        try:
            layers.append(HELD[kind](block, x, idx))
        except AttributeError as error:
            fail(f"model.py has changed block={kind!r}, and tools/explain.py has not: {error}")
        x = x + layers[-1].write(Parts.whole(x))[0]
    return layers, x


def follow(layers, stream, biases, rows, first=0):
    """The stream (N, T, C) behind the last layer of each of the parts, at positions from first."""
    for layer in layers:
        stream = stream + layer.write(Parts(stream, biases, rows), first)
    return stream


# ---- what is explained -------------------------------------------------------------------------

@dataclass
class Explanation:
    """
    For each position its K targets: the likeliest tokens, the one that came (behind the text, the
    likeliest again), and the average of all tokens.
    """
    layers: list                    # L of HELD, with strengths, gates and values
    chances: torch.Tensor           # (T, V)         their natural logarithms
    targets: torch.Tensor           # (T, K - 1)     token ids; the average has none
    logits: torch.Tensor            # (T, K)         the model's own
    parts: torch.Tensor             # (T, K, T + 2)  of each token, all positions, all biases
    looks: torch.Tensor             # (T, K, L, T)   of each layer's look at each position
    others: torch.Tensor            # (T, K, 3)      beside the looks: own embedding, MLPs, biases


@torch.no_grad()
def explain(model, ids, num_tokens):
    """
    The Explanation of the token ids `ids`, of which only those below num_tokens are tokens.
    Raises UserError where the logits that are recomputed here are not the model's.
    """
    idx, T, C = torch.tensor(ids), len(ids), model.config.n_embd
    wte, ln_f, positions = model.transformer.wte, model.transformer.ln_f, model.positions(0, T)
    layers, x = hold(model, idx)
    logits = model(idx[None], idx[None])[0][0]                                     # (T, V)
    final_scale = norm_scale(x)
    recomputed = normalized(x[None], ln_f, final_scale, Parts.whole(x))[0] @ wte.weight.T
    error = ((recomputed - logits).abs().max() / logits.abs().max()).item()
    # Written so that a NaN is refused, too
    if not error <= 1e-4:
        fail(f"the logits recomputed here differ from the model's by {error:.1e} of the largest: "
             f"model.py computes block={model.config.block!r} in another way than tools/explain.py")

    # -- the targets, each with its row of the head
    logits = logits[:, :num_tokens]
    likeliest = logits.topk(min(CANDIDATES, num_tokens)).indices                   # (T, 10)
    came = torch.cat((idx[1:], likeliest[-1:, 0]))                                 # (T)
    targets = torch.cat((likeliest, came[:, None]), dim=1)                         # (T, K - 1)
    average = wte.weight[:num_tokens].mean(dim=0).expand(T, 1, C)
    heads = torch.cat((wte(targets), average), dim=1)                              # (T, K, C)
    target_logits = torch.cat((logits.gather(1, targets), logits.mean(dim=1, keepdim=True)), dim=1)
    # The final norm and the head in one vector for each target, by which the stream is multiplied
    readout = heads * ln_f.weight
    readout = (readout - readout.mean(dim=-1, keepdim=True)) * final_scale[:, None]
    # What a norm makes of zeros is its bias
    final_bias = heads @ ln_f(torch.zeros(C))                                      # (T, K)

    # -- who gave it: tokens, 8 at a time, then all positions and all biases
    parts = torch.zeros(T, heads.size(1), T + 2)
    for first in range(0, T, 8):
        # Before its own place a token has written nothing, so earlier positions are left out
        N = min(8, T - first)
        own = torch.eye(N, T - first)[..., None]                                   # (N, T, 1)
        stream = follow(layers, own * wte(idx[first:]), torch.zeros(N, 1, 1), own, first)
        parts[first:, :, first:first + N] = torch.einsum("nic,ikc->ikn", stream, readout[first:])
    stream = torch.stack((positions, torch.zeros(T, C)))
    has_biases = torch.tensor([0.0, 1.0]).view(2, 1, 1)
    stream = follow(layers, stream, has_biases, torch.zeros(2, T, 1))
    parts[..., T:] = torch.einsum("nic,ikc->ikn", stream, readout)
    parts[..., -1] += final_bias

    # -- where it was picked up: what was written to the stream, by whom
    looks = torch.stack([layer.looks(readout) for layer in layers], dim=2)
    written = torch.stack((
        wte(idx) + positions,
        sum(layer.mlp_wrote for layer in layers),
        sum(layer.attn.c_proj(torch.zeros_like(layer.u)) for layer in layers)))    # (3, T, C)
    others = torch.einsum("nic,ikc->ikn", written, readout)
    others[..., -1] += final_bias
    return Explanation(layers, logits.log_softmax(dim=-1), targets, target_logits, parts, looks,
                       others)


@torch.no_grad()
def read_banks(model, layers, ids, num_tokens, count=8):
    """
    {token id: for each bank [its nearest rows as (id, cosine), the ids that it speaks for]}. It
    speaks for the tokens that its row raised most, through the gates of those that looked at it in
    this text, W_o and the head.
    """
    head, ln_f = model.transformer.wte.weight[:num_tokens], model.transformer.ln_f
    idx, found = torch.tensor(ids), {token: [] for token in set(ids)}
    for layer in layers:
        if layer.value is not None:
            continue
        table = layer.attn.bank.table[:num_tokens]
        directions = F.normalize(table, dim=-1)
        for token in found:
            cosines = directions @ directions[token]
            cosines[token] = -math.inf
            near = cosines.topk(min(count, num_tokens - 1)).indices.tolist()
            readers = layer.strengths.mean(dim=0)[:, idx == token].sum(dim=1)     # (T)
            value = (readers @ layer.gate) * layer.attn.bank.gamma * table[token]  # (M)
            written = layer.attn.c_proj.weight @ value
            raised = head @ (ln_f.weight * (written - written.mean()))
            speaks = raised.topk(min(count, num_tokens)).indices.tolist()
            found[token].append([[(i, round(cosines[i].item(), 3)) for i in near], speaks])
    return found


# ---- the page ----------------------------------------------------------------------------------

def exact(numbers):
    """A tensor for the page as float64, compressed: its shape and its bytes in base64."""
    data = zlib.compress(numbers.double().contiguous().numpy().tobytes())
    return {"shape": list(numbers.shape), "numbers": base64.b64encode(data).decode()}


def rounded(numbers):
    """A tensor for the page in one byte a number: each row in steps of 1/127 of its largest."""
    scale = numbers.abs().amax(dim=-1, keepdim=True) / 127
    steps = (numbers / scale.clamp_min(1e-30)).round().to(torch.int8)
    data = zlib.compress(steps.contiguous().numpy().tobytes())
    return {"shape": list(numbers.shape), "steps": base64.b64encode(data).decode(),
            "scale": exact(scale[..., 0])}


def label(token, tokenizer):
    """A token as the page writes it: spaces, line ends and bytes of half a character visible."""
    if token == tokenizer.end_of_text:
        return "<|endoftext|>"
    text = tokenizer.decode([token]).decode("utf-8", errors="backslashreplace")
    visible = {" ": "·", "\n": "↵\n", "\t": "⇥"}
    shown = "".join(visible.get(c, c if c.isprintable() else f"[U+{ord(c):04X}]") for c in text)
    # An accent of its own gets a circle to stand on
    return f"◌{shown}" if unicodedata.category(shown[0])[0] == "M" else shown


def page_data(run, model, tokenizer, ids, explanation):
    """What the page shows, as a dict for JSON."""
    layers, e = explanation.layers, explanation
    V, T, is_dva = tokenizer.vocab_size, len(ids), model.config.block == "dva"
    # The average of all tokens has no chance of its own
    chances = F.pad(e.chances.gather(1, e.targets).exp(), (0, 1))
    # The exact sum is added up here, before the parts are rounded
    sums = e.parts.double().sum(dim=-1)
    look_sums = e.looks.double().sum(dim=(-1, -2)) + e.others.double().sum(dim=-1)
    figures = [chances, e.logits, sums, look_sums, *e.parts[..., T:].unbind(-1),
               *e.others.unbind(-1)]
    banks = read_banks(model, layers, ids, V)
    used = {*ids, *e.targets.flatten().tolist()}
    for meanings in banks.values():
        for near, speaks in meanings:
            used |= {*(i for i, _ in near), *speaks}
    return {
        "run": run, "block": model.config.block, "note": "", "ids": ids,
        "bank_layers": [n for n, layer in enumerate(layers) if layer.value is None],
        "size": f"{model.config.n_layer} layers, {model.config.n_embd} channels, {V} tokens, "
                f"{model.num_params():,} parameters",
        "labels": {token: label(token, tokenizer) for token in sorted(used)},
        "targets": e.targets.tolist(),
        "figures": exact(torch.stack([f.double() for f in figures], dim=-1)),
        "parts": rounded(e.parts[..., :T]), "looks": rounded(e.looks.flatten(-2)),
        "strengths": rounded(torch.stack([layer.strengths for layer in layers])),
        "values": rounded(torch.stack([layer.u for layer in layers])),
        "gates": rounded(torch.stack([layer.gate for layer in layers])) if is_dva else None,
        "banks": banks if model.config.bank_layers else None, "against": None,
    }


def compare(run, explanation, other, ids, num_tokens):
    """How much each token was expected (ln of its chance) by this run and by the model `other`."""
    idx = torch.tensor(ids)
    with torch.no_grad():
        theirs = other(idx[None], idx[None])[0][0, :-1, :num_tokens].log_softmax(dim=-1)
    came = idx[1:, None]
    return {"run": run, "block": other.config.block,
            "ours": explanation.chances[:-1].gather(1, came)[:, 0].tolist(),
            "theirs": theirs.gather(1, came)[:, 0].tolist()}


def page(data):
    """The HTML page, as bytes. No text in the data can end the script element that holds it."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    return TEMPLATE.read_text(encoding="utf-8").replace("{{DATA}}", text).encode()


# ---- the command -------------------------------------------------------------------------------

def load(source, cfg):
    """The model and the tokenizer of a run, or of what else read_weights takes."""
    weights = read_weights(source)
    model = build_model(ModelConfig(**weights["model_config"]), weights).eval().float()
    return model, find_tokenizer(weights, cfg)


def most_tokens(model):
    """How many tokens of this model fit into a page."""
    cfg, K = model.config, CANDIDATES + 2
    # A gpt2 block has several heads, and no gate to store beside its values
    heads, width = (cfg.n_head, cfg.n_embd) if cfg.block == "gpt2" else (1, 2 * cfg.value_dim)
    for T in range(MOST_TOKENS, 1, -1):
        pairs = T * T / 2
        numbers = {"parts": K * pairs, "looks": K * pairs * cfg.n_layer, "figures": K * T * 9,
                   "strengths": heads * pairs * cfg.n_layer, "values": T * width * cfg.n_layer}
        if sum(count * BYTES[kind] for kind, count in numbers.items()) <= 0.9 * MOST_BYTES:
            return T
    return 1


def write_page(cfg, model, tokenizer, ids, other):
    """
    (dest, ids, explanation): write the page on the newest of the token ids, as many as the models
    see and a page holds, and tell where it is and which ids these are.
    """
    limits = {"the window of this model": model.config.block_size,
              "what a page of 5 MB holds of this model": most_tokens(model)}
    if other:
        limits[f"the window of {cfg.against}"] = other.config.block_size
    reason, most = min(limits.items(), key=lambda limit: limit[1])
    text = ids
    while True:
        ids = text[-most:]
        explanation = explain(model, ids, tokenizer.vocab_size)
        data = page_data(cfg.out_dir, model, tokenizer, ids, explanation)
        if len(ids) < len(text):
            data["note"] = (f"The text has {len(text)} tokens. This page explains the newest "
                            f"{most}: that is {reason}.")
        if other:
            data["against"] = compare(cfg.against, explanation, other, ids, tokenizer.vocab_size)
        html = page(data)
        if len(html) <= MOST_BYTES or most == 1:
            break
        # The numbers of a model that looks at everything alike hardly compress. The size of a page
        # grows with the square of its text.
        reason = "what a page of 5 MB holds of this model"
        most = max(1, int(0.97 * len(ids) * math.sqrt(MOST_BYTES / len(html))))
    folder = Path(cfg.out_dir)
    dest = Path(cfg.dest or (folder if folder.is_dir() else Path()) / "explain.html")
    with replacing(dest) as file:
        file.write(html)
    if data["note"]:
        print(data["note"])
    return dest, ids, explanation


def print_givers(explanation, ids, tokenizer):
    """Print the newest token's five largest givers."""
    # Where the text is one token, nothing stands before it: then the one that is expected next
    i = max(0, len(ids) - 2)
    target = explanation.targets[i, -1].item()
    parts = explanation.parts[i, -2, :i + 1]
    name = json.dumps(label(target, tokenizer).strip("\n"), ensure_ascii=False)
    print(f"the newest token, {name}, has a logit of {explanation.logits[i, -2]:.3f}; the largest "
          f"parts of it came from")
    for j in parts.abs().topk(min(5, len(parts))).indices.tolist():
        before = "".join(label(token, tokenizer).strip("\n") for token in ids[max(0, j - 8):j])
        giver = label(ids[j], tokenizer).strip("\n")
        print(f"  {parts[j]:+8.3f}  {giver}  (token {j + 1}, after {before or 'nothing'})")
    print(f"  {explanation.parts[i, -2, -2:].sum():+8.3f}  all positions and biases together")


def main(argv=None):
    cfg = load_settings(ExplainConfig, argv)
    model, tokenizer = load(cfg.out_dir, cfg)
    other = None
    if cfg.against:
        other, other_tokenizer = load(cfg.against, cfg)
        if not same_tokenizer(other_tokenizer.spec, tokenizer.spec):
            fail(f"against={cfg.against}: its tokens are not those of {cfg.out_dir}, so the two "
                 f"cannot be compared on one text")
    ids = encode_prompt(read_prompt(cfg.start, tokenizer), tokenizer)
    from_file = cfg.start == "-" or cfg.start.startswith("FILE:")
    added = cfg.max_new_tokens
    if added == -1:
        added = 0 if from_file else 120
    torch.manual_seed(cfg.seed)
    added_ids = stream(model, torch.tensor([ids]), added, cfg.temperature, top_k=200,
                       num_tokens=tokenizer.vocab_size)
    ids += [new.item() for new in added_ids]
    dest, ids, explanation = write_page(cfg, model, tokenizer, ids, other)
    print_givers(explanation, ids, tokenizer)
    print(f"open in a browser: {dest} ({dest.stat().st_size / 1e3:,.0f} kB)")


if __name__ == "__main__":
    run_script(main)
