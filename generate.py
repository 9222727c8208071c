"""
Text from a model: token ids, one after another, each drawn from what the model expects.
"""
import torch


class Cache:
    """
    What the model remembers while it decodes, so that a new token costs one position and not the
    whole text. A layer with a bank keeps no values: it looks them up by the ids.
    """

    def __init__(self, size):
        self.size = size            # positions that there is room for
        self.length = 0             # positions before this call
        self.ids = None             # their token ids and this call's (B, S)
        self.keys = {}              # attention layer: (B, H, size, D)
        self.values = {}            # attention layer: (B, H, size, M / H)

    def append(self, store, layer, new):
        """Put new (B, H, T, N) behind the past in store[layer]; return both, (B, H, S, N)."""
        if layer not in store:
            B, H, _, N = new.shape
            store[layer] = new.new_empty(B, H, self.size, N)
        end = self.length + new.size(2)
        store[layer][:, :, self.length:end] = new
        return store[layer][:, :, :end]


@torch.no_grad()
def stream(model, idx, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, stop_token=-1,
           num_tokens=None):
    """
    Continue each row of idx (B, T), T >= 1, and yield the next ids (B, 1), one after another.

    temperature, top_k and top_p: see `draw`. Only ids below num_tokens are drawn, since a
    padded table has rows that are no token. A row that drew stop_token goes on with it; when
    all rows have, the stream ends. Each row has random numbers of its own, which follow from
    torch's seed, so that a text does not depend on how many others are made with it.

    Positions are learned, so a full window cannot slide. Its newer half becomes the prompt of
    the next one: a token sees between block_size / 2 and block_size others.
    """
    size = model.config.block_size
    seeds = torch.randint(2**62, (idx.size(0),)).tolist()
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    stopped = torch.zeros_like(idx[:, :1], dtype=torch.bool)           # (B, 1)
    window = new = idx[:, -size:]
    cache = Cache(min(size, window.size(1) + max_new_tokens))
    for _ in range(max_new_tokens):
        if window.size(1) > size:
            window = new = window[:, -max(1, size // 2):]
            cache = Cache(size)
        logits, _ = model(new, cache=cache)
        luck = torch.stack([torch.rand(1, generator=generator) for generator in generators])
        new = draw(logits[:, -1, :num_tokens], luck.to(idx.device), temperature, top_k, top_p)
        new = new.masked_fill(stopped, stop_token)
        window = torch.cat((window, new), dim=1)
        yield new
        stopped |= new == stop_token
        if stopped.all():
            return


def generate(model, idx, max_new_tokens, **options):
    """idx (B, T) with up to max_new_tokens more in each row; the options are stream's."""
    return torch.cat([idx, *stream(model, idx, max_new_tokens, **options)], dim=1)


def draw(logits, luck, temperature=1.0, top_k=0, top_p=1.0):
    """
    One token id (B, 1) for each row of logits (B, V), chosen by luck (B, 1), uniform in [0, 1).

    Temperature 0 takes the likeliest token. top_k, if not 0, leaves the k likeliest tokens; top_p
    below 1 leaves the fewest likeliest that together have that probability (arXiv 1904.09751).
    """
    if temperature < 1e-5:                                             # a division would overflow
        return logits.argmax(dim=-1, keepdim=True)
    chances, ids = (logits.float() / temperature).softmax(dim=-1), None
    if top_k or top_p < 1:
        V = logits.size(-1)
        chances, ids = chances.topk(min(top_k or V, V))                # (B, k), the likeliest first
    if top_p < 1:
        share = chances / chances.sum(dim=-1, keepdim=True)
        likelier = share.cumsum(dim=-1) - share                        # what those before it have
        chances = chances.masked_fill(likelier >= top_p, 0)
    # The token at which the running sum exceeds a random share of the whole. That takes one random
    # number; torch.multinomial draws V of them, which took 4 % to 8 % of a token's time.
    sums = chances.cumsum(dim=-1)
    place = torch.searchsorted(sums, luck * sums[:, -1:], right=True)  # (B, 1)
    return place if ids is None else ids.gather(-1, place)
