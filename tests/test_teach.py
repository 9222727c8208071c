"""
The page that learns: in a real browser its gradients are autograd's, its steps are those of
nanodva/optimizers.py, and what it saves is the same model in Python.
"""
import json
import shutil
import subprocess

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, command_line, records, save_run, shaken, tiny, tokens
from torch.nn.utils import clip_grad_norm_

import train
from nanodva.optimizers import build_optimizer, set_learning_rate
from nanodva.tokenizer import Tokenizer
from tools import explain as tool

SYSTEMS = [dict(block="dva"), dict(block="dva", rotary="only", bank_layers=1),
           dict(block="dva", rotary=False, value_norm=False, value_dim=24, bank_layers=1),
           dict(block="gpt2"), dict(block="gpt2", rotary=True, gelu="tanh", bank_layers=1),
           dict(block="gpt2", rotary="only")]
each_system = pytest.mark.parametrize("system", SYSTEMS, ids=lambda system: "-".join(
    f"{name}={value}" for name, value in system.items()))
# For lessons in the page that take a second
QUICK = dict(n_layer=1, n_embd=32, qk_dim=16, block_size=32, batch_size=8, steps=20)
TEXT = "".join(f"{n} times {m} is {n * m}.\n" for n in range(1, 20) for m in range(1, 20))


def build(**system):
    """A small model whose parameters are far from where they start; widths are multiples of 8."""
    shape = dict(n_layer=2, n_embd=32, n_head=2, qk_dim=8, block_size=16, vocab_size=37, bias=False)
    return shaken(tiny(**shape | system))


@pytest.fixture(scope="module")
def page(browser, tmp_path_factory):
    """The browser, which shows a page that can learn."""
    folder = tmp_path_factory.mktemp("page")
    alphabet = "".join(sorted(set(TEXT)))
    model = build(block="dva", rotary="only", bank_layers=1, vocab_size=len(alphabet))
    run = save_run(folder / "run", model, Tokenizer({"kind": "char", "alphabet": alphabet}).spec)
    tool.main([f"--out_dir={run}", "--start=\n", "--max_new_tokens=0"])
    browser.open(run / "explain.html")
    browser.home = run / "explain.html"
    return browser


def start(page, expression):
    """Begin what a JavaScript promise does; finish() waits for it, as long as it may take."""
    page.value(f"window.result = undefined; ({expression}).then(x => {{ result = x; }},"
               f" error => {{ result = {{ error: error.message }}; }}); 0")


def finish(page):
    page.until("window.result !== undefined")
    return page.value("result")


def learn(page, settings, text=TEXT, also=""):
    """What teach() gives for these settings."""
    start(page, f"teach({{...{json.dumps(settings)}, text: {json.dumps(text)}, {also}}})"
                f".then(({{ weights, ...rest }}) => ({{ ...rest, weights: [...weights] }}))")
    return finish(page)


# In the page: steps on given batches, from given weights. Each gives its loss, its gradients before
# the step and the weights after it.
STEPS = """((config, weights, batches, T, rates, settings, kernels) => {
  const learner = new Learner(config, kernels === "none" ? [] : kernelsOfThePage().slice(kernels));
  const list = part => Object.fromEntries(Object.entries(learner.params).map(([name, p]) => [name,
    [...p[part] ? p[part].data.subarray(0, learner.real(p).length) : learner.real(p)]]));
  for (const name in weights) learner.real(learner.params[name]).set(weights[name]);
  return batches.map(([ids, targets], n) => {
    learner.grads.fill(0);
    const loss = learner.pass(Uint16Array.from(ids), Uint16Array.from(targets), T, 1 / ids.length);
    const grads = list("grad");
    learner.update(rates[n], { ...DEFAULTS, ...settings });
    return { loss: loss / ids.length, grads, weights: list("") };
  });
})"""


def steps(page, model, batches, rates, settings=None, kernels=0):
    weights = {name: p.flatten().tolist() for name, p in model.named_parameters()}
    flat = [[x.flatten().tolist(), y.flatten().tolist()] for x, y in batches]
    arguments = json.dumps([tool.resolved(model.config), weights, flat, batches[0][0].size(1),
                            rates, settings or {}, kernels])
    return page.value(f"{STEPS}(...{arguments})")


def batches_of(count, B, T):
    ids = [tokens(B, T + 1, seed=seed) for seed in range(count)]
    return [(x[:, :-1], x[:, 1:]) for x in ids]


def differ(found, expected):
    """The largest difference, over the largest number."""
    expected = expected.detach().numpy().flatten()
    return abs(np.array(found) - expected).max() / abs(expected).max()


# ---- gradients and steps -------------------------------------------------------------------------

@pytest.mark.parametrize("T", [16, 8])
@each_system
def test_gradients_are_those_of_autograd(page, system, T):
    model, [(x, y)] = build(**system), batches_of(1, 40, T)
    found, = steps(page, model, [(x, y)], [0.0])
    loss = model(x, y)
    loss.backward()
    assert found["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert found["grads"].keys() == dict(model.named_parameters()).keys()
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert differ(found["grads"][name], p.grad) < 1e-4, name


@pytest.mark.parametrize("kernels", [0, 1, "none"])
@each_system
def test_steps_are_those_of_python(page, system, kernels):
    """Muon for matrices, tall ones, too, and AdamW for the rest; with each of the three kernels."""
    model, batches, rates = build(**system), batches_of(2, 6, 16), [2e-3, 1e-3]
    settings = dict(grad_clip=0.5, embedding_lr=3.0, bank_lr=7.0, weight_decay=0.3, beta2=0.99)
    found = steps(page, model, batches, rates, settings, kernels)
    cfg = train.TrainConfig(optimizer="muon", dtype="float32", **settings)
    optimizer = build_optimizer(model, cfg)
    for (x, y), lr, step in zip(batches, rates, found, strict=True):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        model(x, y).backward()
        clip_grad_norm_(model.parameters(), cfg.grad_clip)
        set_learning_rate(optimizer, lr)
        optimizer.step()
        optimizer.zero_grad()
        for name, p in model.named_parameters():
            assert differ(step["weights"][name], p) < 1e-5, name
            moved = np.array(step["weights"][name]) - before[name].flatten().numpy()
            if p.requires_grad:
                assert differ(moved, p - before[name]) < 2e-2, name
        for name, p in model.named_parameters():
            with torch.no_grad():
                p.copy_(torch.tensor(step["weights"][name]).view_as(p))


@pytest.mark.parametrize("block", ["dva", "gpt2"])
def test_thirty_steps_lose_what_train_py_loses(page, data_dir, tmp_path, block):
    """The same weights and batches; the page's learning rates follow train.py's schedule."""
    data = np.memmap(data_dir / "tiny_char" / "train.bin", dtype="uint16", mode="r")
    meta = json.loads((data_dir / "tiny_char" / "meta.json").read_text())
    model = tiny(block=block, rotary="only", n_layer=2, n_embd=32, n_head=2, qk_dim=8,
                 block_size=16, vocab_size=meta["vocab_size"], bias=False)
    run = save_run(tmp_path / "start", model, meta["tokenizer"])
    settings = TINY | dict(dropout=0.0, gradient_accumulation_steps=1, batch_size=8, max_iters=30,
                           optimizer="muon", lr_decay_iters=30, warmup_iters=5, eval_interval=30,
                           init_from=run, dataset="tiny_char", data_dir=data_dir,
                           out_dir=tmp_path / "out")
    for name in ("n_layer", "n_head", "n_embd", "qk_dim", "block_size"):
        del settings[name]
    train.main(command_line(settings))
    expected = [line["train_loss"] for line in records(tmp_path / "out") if "train_loss" in line]
    cfg = train.TrainConfig(block_size=16, vocab_size=meta["vocab_size"], batch_size=8,
                            gradient_accumulation_steps=1)
    batches = [train.get_batch(data, cfg, step, 0, torch.device("cpu")) for step in range(30)]
    rates = page.value("Array.from({ length: 30 }, (_, n) => rateAt(n, 30,"
                       " { learning_rate: 1e-2, min_lr: 1e-3, warmup: 5 }))")
    found = [step["loss"] for step in steps(page, model, batches, rates,
                                        dict(beta2=0.95, embedding_lr=1))]
    assert found == pytest.approx(expected, abs=1e-3)
    assert found[-1] < found[0] - 0.3


@pytest.mark.parametrize("block", ["dva", "gpt2"])
def test_workers_and_kernels_change_nothing(page, block):
    runs = {name: learn(page, QUICK | dict(block=block), also=also) for name, also in [
        ("one", "workers: 1"), ("two", "workers: 2"), ("three", "workers: 3"),
        ("strict", "workers: 1, modules: kernelsOfThePage().slice(1)"),
        ("none", "workers: 2, modules: []")]}
    for name, run in runs.items():
        assert run["losses"] == pytest.approx(runs["one"]["losses"], abs=1e-5), name
        assert run["val_loss"] == pytest.approx(runs["one"]["val_loss"], abs=1e-5)
    assert len(runs["one"]["losses"]) == 20
    assert runs["one"]["losses"][-1] < runs["one"]["losses"][0] - 0.5
    # Another seed is another run, the same one is the same
    assert learn(page, QUICK | dict(block=block, seed=2))["losses"] != runs["one"]["losses"]
    assert learn(page, QUICK | dict(block=block), also="workers: 2")["weights"] == \
        runs["two"]["weights"]


@pytest.mark.parametrize("changes, text, message", [
    (dict(n_embd=20), TEXT, "n_embd is 20: here it must be a multiple of 8"),
    (dict(block="gpt2", n_embd=48), TEXT, "n_embd / n_head is 12"),
    ({}, "too short", "the text has 9 characters, and needs more than 330"),
    ({}, "", "the text has 0 characters"),
    (dict(vocab=list("0123456789")), TEXT, "does not know “ ")])
def test_what_the_page_cannot_learn_is_one_line(page, changes, text, message):
    assert message in learn(page, QUICK | changes, text)["error"]


def test_the_kernels_are_their_source(tmp_path):
    """The bytes in tools/ are what the pinned assembler makes of tools/kernel.ts."""
    assembler = shutil.which("asc") or shutil.which("asc", path=ROOT / "node_modules" / ".bin")
    if not assembler:
        pytest.skip("no assembler on this machine: npm install assemblyscript@0.28.20")
    for name, more in (("kernel", []), ("kernel_relaxed", ["--enable", "relaxed-simd"])):
        made = tmp_path / f"{name}.wasm"
        subprocess.run([assembler, "tools/kernel.ts", "-o", made, "-O3", "--runtime", "stub",
                        "--importMemory", "--enable", "simd", *more], cwd=ROOT, check=True)
        assert made.read_bytes() == (ROOT / "tools" / f"{name}.wasm").read_bytes()
