"""
The page that holds the model: in a real browser it computes what model.py does, its parts are those
of autograd and add up to the logit, it takes real keys, and text stays text.
"""
import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from browser import QUIET
from conftest import ROOT, refused, save_run, shaken, tiny

from model import BLOCKS, generate, rotate
from nanodva.tokenizer import Tokenizer
from tools import explain as tool

# Characters that would end a script element, wide ones, and some that are written from the right
ATTACK = "</script><script>alert(1)</script>"
TEXT = "the cat sat on the mat,\nשלום 你好 and the dog ate it. " + ATTACK + "<!-- &lt;"
ALPHABET = "".join(sorted(set(TEXT)))
SYSTEMS = [dict(block=block, bank_layers=banks, rotary=rotary, bias=bias)
           for block in ("dva", "gpt2") for banks, rotary, bias in
           [(0, False, False), (0, True, True), (1, True, False), (2, "only", True)]]
each_system = pytest.mark.parametrize("system", [
    *SYSTEMS, dict(block="dva", value_norm=False, value_dim=12), dict(block="gpt2", gelu="tanh")],
    ids=lambda system: "-".join(f"{name}={value}" for name, value in system.items()))


def build(**changes):
    """A tiny model with random weights, large enough that its strengths are far from equal."""
    settings = dict(n_layer=2, n_embd=16, block_size=48, vocab_size=len(ALPHABET), bias=False)
    return shaken(tiny(**settings | changes))


def load(folder):
    """The model as the page computes with it."""
    return tool.load(str(folder), tool.ExplainConfig())[0]


@pytest.fixture(scope="session")
def characters():
    return Tokenizer({"kind": "char", "alphabet": ALPHABET})


@pytest.fixture(scope="module")
def runs(tmp_path_factory, characters, gpt2_files):
    """{name: folder} of small runs."""
    folder = tmp_path_factory.mktemp("runs")
    models = {
        "dva": (build(block="dva", bank_layers=1), characters.spec),
        "gpt2": (build(block="gpt2", block_size=64), characters.spec),
        # A padded table: its last 20 rows are no tokens
        "bpe": (build(block="dva", vocab_size=3020), Tokenizer({"kind": "gpt2:3000"}).spec)}
    return {name: save_run(folder / name, *parts) for name, parts in models.items()}


@pytest.fixture
def write(runs, tmp_path, capsys):
    """write(run, text, **settings): run the command -> (the page's path, what it printed)."""
    def write(run, text=TEXT[:40], **settings):
        (tmp_path / "text.txt").write_bytes(text.encode())
        settings = {"start": f"FILE:{tmp_path / 'text.txt'}", "dest": tmp_path / "page.html",
                    "out_dir": runs.get(run, run)} | settings
        tool.main([f"--{name}={value}" for name, value in settings.items()])
        return Path(settings["dest"]), capsys.readouterr().out
    return write


# ---- the command ---------------------------------------------------------------------------------

def test_the_terminal_gets_five_givers_that_autograd_finds(write, runs, characters):
    page, out = write("dva")
    model, ids = load(runs["dva"]), characters.encode(TEXT[:40])
    with torch.no_grad():
        logits = model(torch.tensor([ids]))[0, -1]
    parts, logit = tool.parts_of(model, ids, logits.argmax().item())
    # Held or not, the model computes the same
    assert logit == pytest.approx(logits.max().item(), rel=1e-5)
    shown = [float(line.split()[0]) for line in out.splitlines() if "(token " in line]
    assert shown == pytest.approx(parts[parts.abs().topk(5).indices].tolist(), abs=6e-4)
    assert out.splitlines()[-1].startswith(f"open in a browser: {page}")


def test_a_prompt_longer_than_the_window_is_said_to_be(write):
    _, out = write("dva", TEXT)
    assert f"the prompt has {len(TEXT)} tokens: the model reads the newest 48" in out
    assert "the model reads" not in write("dva", TEXT[:48])[1]


def test_a_page_without_a_prompt_opens_at_a_line_end(write):
    page, out = write("dva", start="\n")
    assert '"start": "\\n"' in page.read_text() and "(token 1, after nothing)" in out


@pytest.mark.parametrize("settings, parts", [
    (dict(start="Q"), ["'Q'", "alphabet"]), (dict(out_dir="nowhere"), ["nowhere"]),
    (dict(against="BPE"), ["against=", "tokens"]), (dict(max_new_tokens=-2), ["max_new_tokens=-2"]),
    (dict(start="FILE:missing.txt"), ["missing.txt"])])
def test_what_the_user_got_wrong_is_one_line(write, runs, settings, parts):
    settings = {name: runs["bpe"] if value == "BPE" else value for name, value in settings.items()}
    with refused(*parts):
        write("dva", **settings)


def test_a_page_takes_the_place_of_a_page_alone(write, tmp_path):
    checkpoint = tmp_path / "best.pt"
    checkpoint.write_bytes(b"weights")
    for dest in (checkpoint, tmp_path):
        with refused("is there and is no .html: name a new file"):
            write("dva", dest=dest)
    assert checkpoint.read_bytes() == b"weights"
    write("dva")
    write("dva")


def test_models_that_no_page_can_hold(write, tmp_path, characters, monkeypatch):
    mean = save_run(tmp_path / "mean", build(block="mean"), characters.spec)
    with refused("block='mean'", "dva and gpt2", "--against", "tools/read.js"):
        write("dva", against=mean)
    model = build(block="dva")
    with torch.no_grad():
        model.transformer.h[0].attn.c_q.weight[0, 0] = 1e6
    save_run(tmp_path / "large", model, characters.spec)
    with refused("h.0.attn.c_q.weight", "65504"):
        write(tmp_path / "large")
    # A tokenizer that was trained elsewhere may have its special tokens first
    spec = Tokenizer({"kind": "gpt2:300"}).spec | {"kind": "bpe", "end_of_text": 0}
    save_run(tmp_path / "first", build(vocab_size=300), spec)
    with refused("to be the last token", "it is number 0"):
        write(tmp_path / "first")
    monkeypatch.setattr(tool, "MOST_PARAMETERS", model.num_params() - 1)
    with refused("0.0 M", "sample.py"):
        write(tmp_path / "large")


# ---- a real browser ------------------------------------------------------------------------------

def number(text):
    return float(text.replace("−", "-").replace("%", ""))


# In the page: everything that is compared with Python, for a text and a list of [place, token]
COMPUTE = """(async (ids, wanted, count, away) => {
  const [model] = models, job = { over: false }, memory = model.memory(away), written = [];
  await remember(model, memory, ids, job);
  const parts = [];
  for (const [i, token] of wanted) {
    const head = model.rowOf(model.transformer.wte, token);
    const { parts: tokens, positions, biases } = await model.parts(memory, i, head, job);
    parts.push({ parts: [...tokens], positions, biases,
                 looks: model.looks(memory, i, head).map(row => [...row]) });
  }
  for await (const id of writeOn(model, model.memory(away), ids, 0, () => 0, job))
    if (written.push(id) === count) break;
  return { logits: ids.map((_, i) => [...model.logits(memory, i)]), parts, written };
})"""


def compute(browser, ids, wanted=(), count=1, away=None):
    arguments = json.dumps([ids, list(wanted), count, away or {}])
    return browser.value(f"{COMPUTE}(...{arguments})")


def differ(found, expected):
    """The largest difference, over the largest number."""
    found, expected = np.array(found), expected.detach().numpy()
    return abs(found - expected).max() / abs(expected).max()


@each_system
def test_the_page_computes_what_model_py_does(browser, write, tmp_path, characters, system):
    folder = save_run(tmp_path / "run", build(**system), characters.spec)
    browser.open(write(folder)[0])
    ids, wanted = characters.encode(TEXT)[:30], [(0, 3), (7, 5), (29, 10), (20, 11)]
    model, idx = load(folder), torch.tensor([ids])
    page = compute(browser, ids, wanted, count=60)
    logits = model(idx)[0]
    assert differ(page["logits"], logits) < 1e-5
    # 90 tokens do not fit into the window of 48
    assert ids + page["written"] == generate(model, idx, 60, temperature=0)[0].tolist()

    for (i, token), found in zip(wanted, page["parts"], strict=True):
        total = sum(found["parts"]) + found["positions"] + found["biases"]
        assert total == pytest.approx(logits[i, token].item(), abs=1e-5 * logits.abs().max().item())
        assert bool(found["positions"]) == (model.config.has_learned_positions)
        assert bool(found["biases"]) == model.config.bias
        expected, _ = tool.parts_of(load(folder), ids[:i + 1], token)
        assert differ(found["parts"], expected) < 1e-5


def test_the_looks_are_what_each_pairs_own_value_writes(browser, write, tmp_path, characters):
    """The brute force that the fast way avoids: all (T, T, M) values of the pairs."""
    model = build(block="dva", bank_layers=1)
    folder = save_run(tmp_path / "run", model, characters.spec)
    browser.open(write(folder)[0])
    ids, inputs, model = characters.encode(TEXT)[:12], [], load(folder)
    found = compute(browser, ids, [(11, 4)])["parts"][0]["looks"]
    for module in (*(block.attn for block in model.transformer.h), model.transformer.ln_f):
        module.register_forward_pre_hook(lambda module, given: inputs.append(given[0][0]))
    model(torch.tensor([ids]))
    last = inputs[-1][-1]
    for layer, block in enumerate(model.transformer.h):
        attn, x = block.attn, inputs[layer]
        q, k = (rotate(c(x), model.rotary[:, :12]) for c in (attn.c_q, attn.c_k))
        s = (q @ k.T / 8 ** 0.5 + torch.full((12, 12), -torch.inf).triu(1)).softmax(dim=-1)
        u = attn.c_v(x) if attn.bank is None else attn.bank(torch.tensor(ids))
        rms = ((s @ u).square().mean(dim=-1, keepdim=True) + 1e-5).sqrt()
        v = (attn.norm.weight * attn.c_gate(x) / rms)[:, None] * u[None]  # (T, T, M)
        written = (s[..., None] * v) @ attn.c_proj.weight.T                            # (T, T, C)
        written = (written - written.mean(dim=-1, keepdim=True))[-1]
        written = written / (last.var(correction=0) + 1e-5).sqrt()
        expected = written @ (model.lm_head.weight[4] * model.transformer.ln_f.weight)
        assert differ(found[layer], expected) < 1e-4


def without(model, piece):
    """The model with a piece taken away, as a hack in Python would do it."""
    blocks = model.transformer.h
    if piece == "layer":
        del blocks[1]
    for block in blocks:
        if piece == "gate":
            block.attn.c_gate.register_forward_hook(lambda module, x, out: torch.ones_like(out))
        elif piece == "norm":
            block.attn.norm = torch.nn.Identity()
        elif piece == "mlp":
            block.mlp.register_forward_hook(lambda module, x, out: torch.zeros_like(out))
        elif piece == "rotary":
            model.rotary = None
    return model


@pytest.mark.parametrize("block", ["dva", "gpt2"])
def test_each_switch_takes_away_what_it_says(browser, write, tmp_path, characters, block):
    model = build(block=block, n_layer=3, rotary=True)
    folder = save_run(tmp_path / "run", model, characters.spec)
    browser.open(write(folder)[0])
    ids = characters.encode(TEXT)[:30]
    for piece in ["layer", "rotary", *(["gate", "norm"] if block == "dva" else ["mlp"])]:
        with torch.no_grad():
            model, idx = without(load(folder), piece), torch.tensor([ids])
            expected = model(idx)[0]
        page = compute(browser, ids, [(29, 3)], away={piece: 1})
        assert differ(page["logits"], expected) < 1e-5
        found = page["parts"][0]
        assert sum(found["parts"]) + found["positions"] == pytest.approx(page["logits"][29][3])


def test_a_switch_changes_all_panels_and_the_loss(browser, write, runs, characters):
    browser.open(write("dva")[0])
    browser.choose("passage", TEXT[:40])
    before, idx = browser.text("#expected b"), torch.tensor([characters.encode(TEXT[:40])])
    browser.click("summary:has(+ form)")
    for box in ("gate", "norm", "rotary"):
        browser.click(f"#switches [name={box}]")
    model = load(runs["dva"])
    losses = [model(idx[:, :-1], idx[:, 1:]).item()]
    for piece in ("gate", "norm", "rotary"):
        model = without(model, piece)
    losses.append(model(idx[:, :-1], idx[:, 1:]).item())
    shown = [number(text) for text in browser.text("#losses td:nth-child(2)")[1:]]
    assert shown == pytest.approx(losses, abs=6e-4)
    assert "the gates and the value's norm" in browser.text("#changed")[0]
    assert browser.text("#expected b") != before and len(browser.text("#endings p")) == 2
    browser.click("#switches [name=gate]")
    browser.click("#switches [name=norm]")
    browser.click("#switches [name=rotary]")
    assert browser.text("#expected b") == before


# Spaces of which JavaScript and Python think differently, contractions, digits, long words, joined
# emoji, accents of their own, line ends of three kinds
HARD = ["", " ", "I'll don't WE'LL it's  two   spaces \n\n\n a\tb \r\n c\r",
        "a\u0085b\ufeff c\ufeff", "\ufeffx\u2028y\u00a0 z\u3000", "x² ½ 12345 ٣٤ Ⅷ",
        "naïve Ünïcödé e\u0301", "a" * 3000, "👩‍👩‍👧 🇩🇪 你好，世界 שלום", "<|endoftext|>",
        "a <|endoftext|> b", "\0\x1f\x7f", " '", "''s 's", TEXT]


def test_both_tokenizers_give_pythons_ids(browser, write, runs, characters):
    draw = random.Random(1)
    alphabet = " \n\t'sdlvermt0aé½你\u0085\ufeff\u00a0\u200d\U0001f600.!-\r"
    texts = HARD + ["".join(draw.choices(alphabet, k=draw.randint(1, 30))) for _ in range(300)]
    bpe = tool.load(str(runs["bpe"]), tool.ExplainConfig())[1]
    expected = [[bpe.end_of_text] if text == "<|endoftext|>" else bpe.encode(text)
                for text in texts]
    browser.open(write("bpe", "the cat")[0])
    given = json.dumps(texts)
    assert browser.value(f"{given}.map(text => idsIn(encode(text)))") == expected
    assert browser.value(f"{given}.map(text => textOf(encode(text)))") == texts
    # Where a character takes several tokens, each of them is visible
    shown = browser.value(f"{bpe.encode(' 你好')}.map(label)")
    assert shown[0].startswith("·") or shown[0].startswith("\\x20")
    assert all("\ufffd" not in name for name in shown) and "\\x" in "".join(shown)

    browser.open(write("dva", "the cat")[0])
    assert browser.value(f"idsIn(encode({json.dumps(TEXT)}))") == characters.encode(TEXT)
    assert browser.value("[...'aZ!'].map(letter => encode(letter)[0].id >= 0)") == [
        letter in ALPHABET for letter in "aZ!"]


def expected_in(browser):
    """{name: chance} of the likeliest tokens that panel 1 shows."""
    return dict(zip(browser.text("#expected bdi"), map(number, browser.text("#expected b")),
                    strict=True))


def chances(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids]))[0, -1].softmax(dim=-1) * 100


def test_typing_and_continuing_by_key(browser, write, runs, characters):
    browser.open(write("dva", "the c")[0])
    model, text = load(runs["dva"]), "the cat sat"
    while browser.value("document.activeElement.id") != "text":
        browser.press("Tab")
    for letter in "at satt":
        browser.press(letter, letter)
    browser.press("Backspace")
    assert browser.value("document.getElementById('text').value") == text
    shown, ids = expected_in(browser), characters.encode(text)
    best = chances(model, ids).topk(10)
    assert list(shown.values()) == pytest.approx(best.values.tolist(), abs=0.06)
    assert browser.text("#question") == [f"It expects “{list(shown)[0]}” next."]
    parts, logit = tool.parts_of(load(runs["dva"]), ids, best.indices[0].item())
    sums = [number(text) for text in browser.text("#sum td")]
    assert sums[:2] == pytest.approx([logit, logit], abs=1e-5) and abs(sums[2]) < 1e-5
    given = dict(zip(browser.text("#givers small"), browser.text("#givers b"), strict=True))
    assert [number(given[str(j + 1)]) for j in range(len(ids))] == pytest.approx(
        parts.tolist(), abs=6e-4)

    # The cursor one token to the left: what came there, and what was expected
    browser.press("ArrowLeft")
    browser.until("$('question').textContent.endsWith('here, and “t” came.')")
    browser.until(QUIET)
    assert browser.value("document.querySelector('#expected :checked').parentElement"
                         ".querySelector('bdi').textContent") == "t"
    came = chances(model, ids[:-1])[ids[-1]].item()
    assert expected_in(browser)["t"] == pytest.approx(came, abs=0.06)
    # The next token in the list by key, a third by click, and the difference of two
    browser.value("$('expected').querySelector('input').focus()")
    browser.press("ArrowDown")
    assert browser.text("#wanted") == browser.text("#expected label:nth-child(2) bdi")
    assert browser.value("document.activeElement.checked")
    browser.click("#expected label:nth-child(3) input")
    browser.choose("against", str(ids[-1]))
    name = browser.text("#expected label:nth-child(3) bdi")[0]
    logits = model(torch.tensor([ids[:-1]]))[0, -1]
    third = logits.topk(10).indices[2]
    assert browser.text("#wanted") == [name]
    sums = [number(text) for text in browser.text("#sum td")]
    assert sums[:2] == pytest.approx([(logits[third] - logits[ids[-1]]).item()] * 2, abs=1e-5)
    browser.click("#text")
    browser.press("Home")
    browser.until("$('question').textContent.startsWith('Nothing is before the cursor')")

    # Continue, by key, as sample.py does at temperature 0
    browser.press("End")
    browser.choose("temperature", "0")
    browser.press("Tab")
    browser.press("Enter", "\r")
    assert browser.value("document.activeElement.id") == "go"
    written = browser.value("document.getElementById('text').value")
    expected = generate(model, torch.tensor([ids]), 200, temperature=0)[0].tolist()
    assert written == characters.decode(expected).decode()
    assert "window is full: it sees the newest 48" in browser.text("#remark")[0]
    newest = expected[-48:]
    assert list(expected_in(browser).values()) == pytest.approx(
        chances(model, newest).topk(10).values.tolist(), abs=0.06)


def test_stop_and_the_seed(browser, write):
    texts = []
    for seed in (1, 1, 2):
        browser.open(write("dva", "the cat")[0])
        browser.choose("seed", str(seed))
        browser.click("#go", until="state.ids.length > 20")
        browser.click("#stop")
        texts.append(browser.value("document.getElementById('text').value"))
        assert 20 < len(texts[-1]) < 207
        assert not browser.value("document.getElementById('go').disabled")
    length = min(map(len, texts))
    assert texts[0][:length] == texts[1][:length] != texts[2][:length]


def test_a_prompt_is_continued_when_the_page_opens(browser, write):
    browser.open(write("bpe", start="the cat", max_new_tokens=9)[0])
    assert browser.value("state.ids.length") == browser.value("idsIn(encode('the cat')).length") + 9


def test_the_reader_who_differs_most_comes_first(browser, write):
    browser.open(write("dva")[0])
    cosines = [float(text.rpartition(" ")[2]) for text in browser.text("#other option")]
    assert cosines == sorted(cosines) and len(cosines) > 1
    assert browser.text("#cosine") == [f"Cosine of the two values: {cosines[0]:.2f}."]
    assert browser.value("document.querySelectorAll('#banks .rows, #bank-rows h3').length") == 1
    browser.open(write("gpt2")[0])
    assert "They are the same." in browser.text("#meaning")
    assert browser.value("document.getElementById('banks').hidden")


def test_against_another_run(browser, write, runs, characters, data_dir, tmp_path):
    """The default text is one that neither wrote; where one of them did, the page says so."""
    meta = json.loads((data_dir / "tiny_char" / "meta.json").read_text())
    tokenizer = Tokenizer(meta["tokenizer"])
    V = tokenizer.vocab_size
    ours, theirs = (save_run(tmp_path / name, build(block=block, vocab_size=V), meta["tokenizer"],
                             "tiny_char") for name, block in (("ours", "dva"), ("rival", "gpt2")))
    page, _ = write(ours, "abc", against=theirs, data_dir=data_dir)
    browser.open(page)
    text = browser.value("document.getElementById('passage').value")
    val = np.fromfile(data_dir / "tiny_char" / "val.bin", dtype=meta["dtype"])
    assert len(text) == 48 and text in tokenizer.decode(val.tolist()).decode()
    assert "validation split of tiny_char" in browser.text("#origin")[0]
    idx = torch.tensor([tokenizer.encode(text)])
    losses = [load(folder)(idx[:, :-1], idx[:, 1:]).item() for folder in (ours, theirs)]
    shown = [number(cell) for cell in browser.text("#losses td:nth-child(2)")[1:]]
    assert shown == pytest.approx(losses, abs=6e-4)
    assert browser.text("#losses th")[1:] == [str(ours), str(theirs)]

    browser.click("#copy")
    assert browser.text("#origin") == ["This is a text of yours."]
    browser.click("#go", until="state.ids.length > 60")
    browser.click("#stop")
    browser.click("#copy")
    assert browser.text("#origin")[0].startswith(f"{ours} wrote a part of this text, which favours")

    # The other one takes over all panels
    browser.choose("chosen", "1")
    assert "2 gpt2 layers" in browser.text("#model")[0]
    model, ids = load(theirs), tokenizer.encode(browser.value("$('text').value"))
    assert list(expected_in(browser).values()) == pytest.approx(
        chances(model, ids[-48:]).topk(10).values.tolist(), abs=0.06)


@pytest.mark.parametrize("run", ["dva", "bpe"])
def test_text_stays_text(browser, write, runs, tmp_path, run):
    """A run's name, a prompt and a note that would become elements and end the data."""
    attacker = tmp_path / "<" / "script><img src=x onerror=alert(1)>"
    shutil.copytree(runs[run], attacker)
    # The beginning is outside the window, where many tokens are one piece of text
    text = ATTACK + "<img>" + TEXT + ("\n" if run == "dva" else "\u2028\\")
    page, _ = write(attacker, text, against=attacker, note=ATTACK)
    browser.open(page)
    assert browser.value("document.getElementById('text').value") == text
    assert browser.copy() == text
    assert browser.text("#foot") == [ATTACK] and "<img" in browser.text("#losses")[0]
    browser.choose("passage", ATTACK)
    assert browser.value("document.scripts.length") == 5
    assert browser.value("document.images.length") == 0
    # No dialog, no error, and nothing loaded but the page itself
    told = [event for event in browser.events if event.get("method") in (
        "Page.javascriptDialogOpening", "Runtime.exceptionThrown", "Log.entryAdded")]
    loaded = [event["params"]["request"]["url"] for event in browser.events
              if event.get("method") == "Network.requestWillBeSent"]
    assert not told and loaded == [page.as_uri()]


def test_what_is_typed_lies_on_its_coloured_copy(browser, write):
    """On a narrow screen, with text from the right, empty lines and characters of two widths."""
    browser.open(write("dva", TEXT)[0])
    browser.call("Emulation.setDeviceMetricsOverride", width=400, height=800,
                 deviceScaleFactor=1, mobile=False)
    for text in (TEXT, "the\n\n\n", "שלום שלום שלום שלום\nthe 你好 " * 9, "Q unknown Z", ""):
        browser.choose("text", text)
        assert browser.value("document.documentElement.scrollWidth") <= 400
        tall, copy = browser.value("['text', 'text'].map((id, n) => (n ? $(id)"
                                   ".previousElementSibling : $(id)).scrollHeight)")
        assert tall == copy
        assert browser.copy() == text
    assert browser.text("#question") == ["Nothing is before the cursor: move it, or type."]
    browser.call("Emulation.clearDeviceMetricsOverride")


def test_continue_writes_at_the_cursor(browser, write, runs, characters):
    browser.open(write("dva", "the cat sat on")[0])
    browser.choose("temperature", "0")
    browser.value("$('text').focus(); $('text').setSelectionRange(7, 7); 0")
    browser.click("#go")
    ids = torch.tensor([characters.encode("the cat")])
    written = generate(load(runs["dva"]), ids, 200, temperature=0)[0].tolist()
    expected = characters.decode(written).decode()
    assert browser.value("$('text').value") == expected + " sat on"
    assert browser.value("$('text').selectionStart") == len(expected)


def test_a_long_text_is_cut_with_a_line_and_stays_quick(browser, write):
    """Painting all of it for each letter took 59 s for 200 letters after 20,000."""
    browser.open(write("dva", "the cat")[0])
    browser.value("""(() => {
      const clipboardData = new DataTransfer();
      clipboardData.setData("text", "the cat sat\\n".repeat(200000));
      $("text").dispatchEvent(new ClipboardEvent("paste", { clipboardData, cancelable: true }));
    })()""")
    browser.until(QUIET)
    assert browser.value("$('text').value.length") == 20000
    assert "The text is cut: it holds 20,000 characters." in browser.text("#remark")[0]
    painted = browser.value("""(() => {
      let count = 0;
      const seen = new MutationObserver(list => { for (const { addedNodes } of list)
        for (const node of addedNodes) count += node.textContent.length; });
      seen.observe($("text").previousElementSibling, { childList: true });
      proceed(20);
      return new Promise(resolve => setTimeout(() => resolve(count), 3000));
    })()""")
    # The first letter takes the last colours away
    assert 20 < painted < 40 * 60
    browser.until(QUIET)


def test_what_the_model_does_not_know_is_said(browser, write):
    browser.open(write("dva", "the cat")[0])
    browser.choose("text", "世界")
    assert browser.text("#question") == [
        "The model knows none of the characters before the cursor."]
    browser.choose("passage", "the 世cat")
    assert "It does not know “世”, so it leaves that out." in browser.text("#origin")[0]


def test_bars_of_a_list_share_one_scale(browser, write):
    """Whatever the width of the name before them; a number twice as large has twice the length."""
    browser.open(write("bpe", "the cat sat on the mat")[0])
    browser.call("Emulation.setDeviceMetricsOverride", width=400, height=800,
                 deviceScaleFactor=1, mobile=False)
    sizes = browser.value("[...document.querySelectorAll('#givers li')].map(row => ["
                          "row.querySelector('.bar').getBoundingClientRect().width,"
                          "row.querySelector('b').textContent])")
    browser.call("Emulation.clearDeviceMetricsOverride")
    widths, parts = zip(*((width, abs(number(text))) for width, text in sizes), strict=True)
    assert [width / widths[0] for width in widths] == pytest.approx(
        [part / parts[0] for part in parts], abs=0.02)


def test_the_guessing_game(browser, write, data_dir, tmp_path):
    meta = json.loads((data_dir / "tiny_char" / "meta.json").read_text())
    model = build(block="dva", vocab_size=meta["vocab_size"])
    run = save_run(tmp_path / "ours", model, meta["tokenizer"], "tiny_char")
    browser.open(write(run, "abc", data_dir=data_dir)[0])
    for tries, right in ((1, True), (2, False)):
        browser.click("#play")
        assert browser.text("#question") == ["What comes next? Guess."]
        # Nothing shows how probable a choice is: no number, no bar, no order, no colours
        choices = browser.text("#expected bdi")
        in_order = sorted(choices, key=lambda name: name.replace("·", " "))
        assert choices == in_order and browser.text("#expected b") == []
        assert not browser.value("$('contributions').checkVisibility()")
        place, came = browser.value("[state.place, label(game.answer)]")
        assert browser.value("data.unseen.includes("
                             "$('text').value + textOf(pieces([game.answer])))")
        other = next(name for name in choices if (name == came) == right)
        browser.value(f"[...document.querySelectorAll('#expected label')].find(row =>"
                      f" row.textContent === {json.dumps(other)}).click()")
        browser.until(QUIET)
        score, = browser.text("#score")
        assert score.startswith(f"“{came}” came: {'right' if right else 'not your guess'}.")
        assert "you 1," in score and score.endswith(f"of {tries}.")
        assert browser.text("#expected b") and browser.value("state.place") == place


@pytest.mark.parametrize("block", ["dva", "gpt2"])
def test_what_a_bank_raised_is_what_its_layer_wrote(browser, write, tmp_path, characters, block):
    """The last layer's output at all positions, from one token's row alone, read by the head."""
    model = build(block=block, bank_layers=1, n_head=2)
    folder = save_run(tmp_path / "run", model, characters.spec)
    browser.open(write(folder, "the cat sat")[0])
    browser.choose("key", "1")                                           # the letter h
    model, ids = load(folder), characters.encode("the cat sat")
    attn, idx = model.transformer.h[1].attn, torch.tensor([ids])
    own, seen = idx[0] == ids[1], []
    whole = attn.mix

    def mix(q, k, u, *rest):
        # What is put in front of W_o stays as it is, but for the values of other tokens
        seen.append(whole(q, k, u * own[:, None], *rest) / whole(q, k, u, *rest))
        return whole(q, k, u, *rest)

    attn.mix = mix
    attn.c_proj.register_forward_pre_hook(lambda module, given: (given[0] * seen[-1],))
    wrote = []
    attn.c_proj.register_forward_hook(lambda module, given, out: wrote.append(out[0].sum(dim=0)))
    with torch.no_grad():
        model(idx)
        weight = model.transformer.ln_f.weight
        raised = model.lm_head.weight @ ((wrote[0] - wrote[0].mean()) * weight)
    best = raised[:characters.vocab_size].topk(8).indices.tolist()
    expected = browser.value(f"{best}.map(label)")
    assert browser.text("#bank-rows p:last-child bdi") == expected


def test_a_block_that_was_changed_in_python_is_not_shown(browser, write, monkeypatch):
    """Even where the change is seen by the last of the window's positions alone."""
    class Changed(BLOCKS["dva"]):
        def forward(self, x, idx, rotary, cache=None):
            far = torch.arange(x.size(1))[:, None] > 40
            return x + (1 + 0.1 * far) * self.attn(self.ln_1(x), idx, rotary, cache)

    monkeypatch.setitem(BLOCKS, "dva", Changed)
    browser.open(write("dva")[0])
    note, = browser.text("#note")
    assert "dva blocks in another way" in note and "class Model of tools/read.js" in note
    assert browser.value("document.getElementById('main').hidden")


@pytest.mark.parametrize("block", ["mean", "sigmoid"])
def test_a_block_that_the_page_does_not_know(browser, write, tmp_path, characters, block):
    """What Python can say of it: probabilities, gradient times input, attention if there is any."""
    model = build(block=block, n_head=2)
    folder = save_run(tmp_path / "run", model, characters.spec)
    page, out = write(folder, TEXT[:40])
    assert "gradient times input" in out
    browser.open(page)
    assert browser.text("#note") == [""] and f"“{block}”" in browser.text("#model")[0]
    ids = characters.encode(TEXT[:40])
    best = chances(load(folder), ids).topk(10)
    shown = browser.text("#expected b")
    assert list(map(number, shown)) == pytest.approx(best.values.tolist(), abs=0.06)
    embedding = []
    model = load(folder)
    model.transformer.wte.register_forward_hook(
        lambda module, given, out: embedding.append(out.detach().requires_grad_()) or embedding[0])
    logit = model(torch.tensor([ids]))[0, -1, best.indices[1]]
    gradient, = torch.autograd.grad(logit, embedding)
    parts = (gradient * embedding[0])[0].sum(dim=-1)
    browser.click("#expected label:nth-child(2) input", until="true")
    given = dict(zip(browser.text("#givers small"), browser.text("#givers b"), strict=True))
    assert [number(given[str(j + 1)]) for j in range(40)] == pytest.approx(parts.tolist(), abs=6e-4)
    sums = [number(text) for text in browser.text("#sum td")]
    assert sums[1:] == pytest.approx([logit.item(), logit.item() - parts.sum().item()], abs=1e-4)
    assert browser.value("$('weights').checkVisibility()") == (block == "sigmoid")
    assert not browser.value("$('go').checkVisibility() || $('teach').checkVisibility()")


def test_without_javascript_the_page_says_so_and_nothing_else(browser, write):
    page, _ = write("dva")
    browser.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.call("Page.navigate", url=page.as_uri())
        browser.until("document.body?.innerText.includes('switched off here')")
        shown = browser.value("document.body.innerText")
    finally:
        browser.call("Emulation.setScriptExecutionDisabled", value=False)
    assert shown.startswith("See it think") and len(shown) < 100


def test_the_page_in_docs_still_works(browser):
    page = ROOT / "docs" / "try.html"
    assert page.stat().st_size < 1_500_000
    # It is the page of today: python -m tools.explain, as make try calls it, writes it again
    for script in ROOT.glob("tools/*.js"):
        assert script.read_text() in page.read_text(), script
    browser.open(page)
    assert browser.text("#note") == [""] and len(browser.text("#expected b")) == 10
