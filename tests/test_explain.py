"""The page that holds the model: in a real browser it computes what model.py does."""
import json
import random

import numpy as np
import pytest
import torch
from browser import QUIET, differ
from conftest import ROOT, command_line, ids_of, prepare, refused, save_run, shaken, tiny

from model import BLOCKS, generate, rotate
from nanodva.dataset import SPLITS, read_meta
from nanodva.tokenizer import Tokenizer
from tools import explain as tool

# Characters that would end a script element, wide ones, and some that are written from the right
ATTACK = "</script><script>alert(1)</script>"
TEXT = "the cat sat on the mat,\nשלום 你好 and the dog ate it. " + ATTACK + "<!-- &lt;"
ALPHABET = "".join(sorted(set(TEXT)))
CHARACTERS = Tokenizer({"kind": "char", "alphabet": ALPHABET})
DVA = dict(block="dva", bank_layers=1)
# A padded table: its last 20 rows are no tokens
WORDS = dict(block="dva", tokens={"kind": "gpt2:3000"}, vocab_size=3020)


def save(folder, tokens=CHARACTERS.spec, dataset=None, **shape):
    """A run's folder with a tiny model, so random that its attention is far from uniform."""
    tokenizer = Tokenizer(tokens)
    settings = dict(n_layer=2, n_embd=16, block_size=48, vocab_size=tokenizer.vocab_size,
                    bias=False)
    return save_run(folder, shaken(tiny(**settings | shape)), tokenizer.spec, dataset)


def load(folder):
    """The model as the page computes with it."""
    return tool.load(str(folder), tool.ExplainConfig())[0]


@pytest.fixture
def write(tmp_path, capsys):
    """
    write(run, text, **settings): run the command -> (the page's path, what it printed). The run is
    a folder, or the arguments with which save() makes tmp_path / "run".
    """
    def write(run=DVA, text=TEXT[:40], **settings):
        if isinstance(run, dict):
            run = save(tmp_path / "run", **run)
        (tmp_path / "text.txt").write_bytes(text.encode())
        page = tmp_path / "page.html"
        tool.main(command_line(dict(start=f"FILE:{tmp_path / 'text.txt'}", dest=page, out_dir=run)
                               | settings))
        return page, capsys.readouterr().out
    return write


@pytest.fixture
def show(browser, write, tmp_path):
    """show(run, text, **settings): open the page of a run -> the model that it computes with."""
    def show(run=DVA, *arguments, **settings):
        browser.open(write(run, *arguments, **settings)[0])
        return load(tmp_path / "run" if isinstance(run, dict) else run)
    return show


# ---- the command ---------------------------------------------------------------------------------

def test_the_terminal_gets_five_givers_that_autograd_finds(write, tmp_path):
    page, out = write()
    model, ids = load(tmp_path / "run"), CHARACTERS.encode(TEXT[:40])
    with torch.no_grad():
        logits = model(torch.tensor([ids]))[0, -1]
    parts, logit = tool.parts_of(model, ids, logits.argmax().item())
    # Held or not, the model computes the same
    assert logit == pytest.approx(logits.max().item(), rel=1e-5)
    shown = [float(line.split()[0]) for line in out.splitlines() if "(token " in line]
    assert shown == pytest.approx(parts[parts.abs().topk(5).indices].tolist(), abs=6e-4)
    assert out.splitlines()[-1].startswith(f"open in a browser: {page}")
    assert "the model reads" not in out
    _, out = write(DVA, TEXT)
    assert f"the prompt has {len(TEXT)} tokens: the model reads the newest 48" in out
    # Without a prompt the page opens at the end of a line
    page, out = write(start="\n")
    assert '"start": "\\n"' in page.read_text() and "(token 1, after nothing)" in out


def test_what_no_page_can_hold_is_one_line(write, tmp_path, monkeypatch):
    ours, words, mean = (save(tmp_path / str(n), **shape)
                         for n, shape in enumerate((DVA, WORDS, dict(block="mean"))))
    with refused("against=", "tokens"):
        write(ours, against=words)
    with refused("block='mean'", "dva and gpt2", "--against", "tools/read.js"):
        write(ours, against=mean)
    with refused("is there and is no .html: name a new file"):
        write(ours, dest=words / "best.pt")
    # A tokenizer that was trained elsewhere may have its special tokens first
    spec = Tokenizer({"kind": "gpt2:300"}).spec | {"kind": "bpe", "end_of_text": 0}
    with refused("to be the last token", "it is number 0"):
        write(dict(tokens=spec))
    model = load(ours)
    monkeypatch.setattr(tool, "MOST_PARAMETERS", model.num_params() - 1)
    with refused("0.0 M", "sample.py"):
        write(ours)
    monkeypatch.undo()
    with torch.no_grad():
        model.transformer.h[0].attn.c_q.weight[0, 0] = 1e6
    with refused("h.0.attn.c_q.weight", "65504"):
        write(save_run(ours, model, CHARACTERS.spec))


def test_the_page_is_the_same_if_texts_have_another_encoding_here(write, tmp_path, monkeypatch):
    run = save(tmp_path / "run", **DVA)
    page = write(run)[0].read_bytes()
    # pathlib asks this function, and on Windows gets
    monkeypatch.setattr("io.text_encoding", lambda encoding, *rest: encoding or "cp1252")
    assert write(run)[0].read_bytes() == page


# ---- a real browser ------------------------------------------------------------------------------

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


@pytest.mark.parametrize("system", [
    dict(block="dva"), dict(block="dva", bias=True, bank_layers=1),
    dict(block="dva", rotary="only", bank_layers=2, bias=True),
    dict(block="dva", rotary=False, value_norm=False, value_dim=12), dict(block="gpt2"),
    dict(block="gpt2", rotary=True, bias=True, bank_layers=1),
    dict(block="gpt2", rotary="only", bank_layers=2, gelu="tanh")], ids=str)
def test_the_page_computes_what_model_py_does(browser, show, tmp_path, system):
    ids, wanted = CHARACTERS.encode(TEXT)[:30], [(0, 3), (7, 5), (29, 10), (20, 11)]
    model, idx = show(system), torch.tensor([ids])
    page = compute(browser, ids, wanted, count=60)
    logits = model(idx)[0]
    assert differ(page["logits"], logits) < 1e-5
    # 90 tokens do not fit into the window of 48
    assert ids + page["written"] == generate(model, idx, 60, temperature=0)[0].tolist()

    for (i, token), found in zip(wanted, page["parts"], strict=True):
        total = sum(found["parts"]) + found["positions"] + found["biases"]
        assert total == pytest.approx(logits[i, token].item(), abs=1e-5 * logits.abs().max().item())
        assert bool(found["positions"]) == model.config.has_learned_positions
        assert bool(found["biases"]) == model.config.bias
        expected, _ = tool.parts_of(load(tmp_path / "run"), ids[:i + 1], token)
        assert differ(found["parts"], expected) < 1e-5


def check_expected(browser, model, ids):
    """The panel shows the ten most probable tokens after these ids; the logits are returned."""
    with torch.no_grad():
        logits = model(torch.tensor([ids]))[0, -1]
    shown = browser.numbers("#expected b")[:10]
    assert shown == pytest.approx((100 * logits.softmax(dim=-1)).topk(10).values.tolist(), abs=0.06)
    return logits


def contributed(browser):
    """What panel 2 says that each token contributed, in the order of the text."""
    rows = zip(browser.text("#givers small"), browser.numbers("#givers b"), strict=True)
    # Positions and biases have no number
    return [x for _, x in sorted((int(number), x) for number, x in rows if number)]


def test_the_looks_and_the_readers_are_those_of_each_pairs_own_value(browser, show):
    """The brute force that the fast way avoids: all (T, T, M) values of the pairs."""
    model, ids, inputs, values = show(DVA, TEXT[:12]), CHARACTERS.encode(TEXT[:12]), [], []
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
        values.append(v)
        written = (s[..., None] * v) @ attn.c_proj.weight.T                            # (T, T, C)
        written = (written - written.mean(dim=-1, keepdim=True))[-1]
        written = written / (last.var(correction=0) + 1e-5).sqrt()
        expected = written @ (model.lm_head.weight[4] * model.transformer.ln_f.weight)
        assert differ(found[layer], expected) < 1e-4

    # The page sorts the earlier readers by how much they differ from the newest
    layer, key = browser.value("[+$('layer').value, state.key]")
    read = values[layer][key:, key]
    cosines = torch.cosine_similarity(read[:-1], read[-1:]).sort().values.tolist()
    options = browser.text("#other option")
    assert [float(text.rpartition(" ")[2]) for text in options] == pytest.approx(cosines, abs=6e-3)
    assert browser.text("#cosine") == [f"Cosine of the two values: {cosines[0]:.2f}."]


def without(model, piece):
    """The model with a piece taken away, as a hack in Python would do it."""
    blocks = model.transformer.h
    if piece == "layer":
        del blocks[1]
    if piece == "rotary":
        model.rotary = None
    for block in blocks:
        if piece == "gate":
            block.attn.c_gate.register_forward_hook(lambda module, x, out: torch.ones_like(out))
        if piece == "norm":
            block.attn.norm = torch.nn.Identity()
        if piece == "mlp":
            block.mlp.register_forward_hook(lambda module, x, out: torch.zeros_like(out))
    return model


LOSSES = "#losses tr + tr td:nth-child(2)"


@pytest.mark.parametrize("block, pieces", [("dva", ["layer", "rotary", "gate", "norm"]),
                                           ("gpt2", ["layer", "rotary", "mlp"])])
def test_each_switch_takes_away_what_it_says_in_all_panels(browser, show, tmp_path, block, pieces):
    text = TEXT[:30]
    model = show(dict(block=block, n_layer=3, rotary=True), text)
    idx = torch.tensor([CHARACTERS.encode(text)])
    browser.choose("passage", text)
    browser.click("summary:has(+ form)")
    for piece in pieces:
        if piece == "layer":
            browser.choose("without", "1")
        else:
            browser.click(f"#switches [name={piece}]")
        changed = without(load(tmp_path / "run"), piece)
        found = browser.value("state.ids.map((_, i) => [...state.model.logits(state.memory, i)])")
        assert differ(found, changed(idx)[0]) < 1e-5
        assert abs(browser.numbers("#sum td")[2]) < 1e-5
        losses = [reader(idx[:, :-1], idx[:, 1:]).item() for reader in (model, changed)]
        assert browser.numbers(LOSSES) == pytest.approx(losses, abs=6e-4)
        assert len(browser.text("#endings p")) == 2
        # The model as a whole again
        browser.choose("chosen", "0")
    check_expected(browser, model, idx[0].tolist())


# Spaces of which JavaScript and Python think differently, contractions, digits, long words, joined
# emoji, accents of their own, line ends of three kinds
HARD = ["", " ", "I'll don't WE'LL it's  two   spaces \n\n\n a\tb \r\n c\r",
        "a\u0085b\ufeff c\ufeff", "\ufeffx\u2028y\u00a0 z\u3000", "x² ½ 12345 ٣٤ Ⅷ",
        "naïve Ünïcödé e\u0301", "a" * 3000, "👩‍👩‍👧 🇩🇪",
        "你好，世界 שלום", "<|endoftext|>",
        "a <|endoftext|> b", "\0\x1f\x7f", " '", "''s 's", TEXT]


def test_both_tokenizers_give_pythons_ids(browser, show, tmp_path):
    draw = random.Random(1)
    alphabet = " \n\t'sdlvermt0aé½你\u0085\ufeff\u00a0\u200d\U0001f600.!-\r"
    texts = HARD + ["".join(draw.choices(alphabet, k=draw.randint(1, 30))) for _ in range(300)]
    show(WORDS, start="the cat", max_new_tokens=9)
    # The prompt is continued when the page opens
    assert browser.value("state.ids.length - idsIn(encode('the cat')).length") == 9
    bpe = tool.load(str(tmp_path / "run"), tool.ExplainConfig())[1]
    expected = [[bpe.end_of_text] if text == "<|endoftext|>" else bpe.encode(text)
                for text in texts]
    given = json.dumps(texts)
    assert browser.value(f"{given}.map(text => idsIn(encode(text)))") == expected
    assert browser.value(f"{given}.map(text => textOf(encode(text)))") == texts
    # If a character takes several tokens, each of them is visible
    shown = browser.value(f"{bpe.encode(' 你好')}.map(label)")
    assert shown[0].startswith(("·", "\\x20"))
    assert all("\ufffd" not in name for name in shown) and "\\x" in "".join(shown)

    show(DVA, "the cat")
    assert browser.value(f"idsIn(encode({json.dumps(TEXT)}))") == CHARACTERS.encode(TEXT)
    browser.choose("text", "世界")
    assert browser.text("#question") == [
        "The model knows none of the characters before the cursor."]
    browser.choose("passage", "the 世cat")
    assert "It does not know “世”, so it leaves that out." in browser.text("#origin")[0]


def test_typing_and_continuing_by_key(browser, show, tmp_path):
    model, text = show(DVA, "the c"), "the cat sat"
    while browser.value("document.activeElement.id") != "text":
        browser.press("Tab")
    for letter in "at satt":
        browser.press(letter, letter)
    browser.press("Backspace")
    assert browser.value("$('text').value") == text
    ids = CHARACTERS.encode(text)
    best = check_expected(browser, model, ids).argmax().item()
    assert browser.text("#question") == [
        f"It expects “{browser.text('#expected bdi')[0]}” next."]
    parts, logit = tool.parts_of(load(tmp_path / "run"), ids, best)
    sums = browser.numbers("#sum td")
    assert sums[:2] == pytest.approx([logit, logit], abs=1e-5) and abs(sums[2]) < 1e-5
    assert contributed(browser) == pytest.approx(parts.tolist(), abs=6e-4)

    # The cursor one token to the left: what came there, and what was expected
    browser.press("ArrowLeft", until=f"state.place === {len(ids) - 1} && {QUIET}")
    assert browser.text("#question")[0].endswith("here, and “t” came.")
    assert browser.text("#expected label:has(:checked) bdi") == ["t"]
    logits = check_expected(browser, model, ids[:-1])
    came = 100 * logits.softmax(dim=-1)[ids[-1]].item()
    assert browser.numbers("#expected label:has(:checked) b") == [pytest.approx(came, abs=0.06)]
    # The next token in the list by key, a third by click, and the difference of two
    browser.value("$('expected').querySelector('input').focus()")
    browser.press("ArrowDown")
    assert browser.text("#wanted") == browser.text("#expected label:nth-child(2) bdi")
    assert browser.value("document.activeElement.checked")
    browser.click("#expected label:nth-child(3) input")
    browser.choose("against", str(ids[-1]))
    assert browser.text("#wanted") == browser.text("#expected label:nth-child(3) bdi")
    assert browser.numbers("#sum td")[:2] == pytest.approx(
        [(logits.topk(3).values[-1] - logits[ids[-1]]).item()] * 2, abs=1e-5)

    # Continue and stop, by key: as sample.py does at temperature 0, with more than the window
    browser.click("#text")
    browser.press("End")
    browser.choose("temperature", "0")
    browser.press("Tab")
    browser.press("Enter", "\r", until="state.ids.length > 70")
    assert browser.value("document.activeElement.id") == "stop"
    browser.press("Enter", "\r")
    assert browser.value("document.activeElement.id") == "go"
    written = CHARACTERS.encode(browser.value("$('text').value"))
    assert 70 < len(written) < 211
    assert written == generate(model, torch.tensor([ids]), len(written) - len(ids),
                               temperature=0)[0].tolist()
    assert "window is full: it sees the newest 48" in browser.text("#remark")[0]
    check_expected(browser, model, written[-48:])


def test_continue_writes_at_the_cursor_until_stop_as_the_seed_says(browser, show):
    show(DVA, "the cat sat on")
    written = []
    for seed in ("1", "1", "2"):
        browser.choose("text", "the cat sat on")
        browser.value("$('text').setSelectionRange(7, 7)")
        browser.choose("seed", seed)
        browser.click("#go", until="state.ids.length > 30")
        browser.click("#stop")
        text, cursor = browser.value("[$('text').value, $('text').selectionStart]")
        assert text.startswith("the cat") and text.endswith(" sat on") and cursor == len(text) - 7
        assert 30 < len(text) < 207 and not browser.value("$('go').disabled")
        written.append(text[7:24])
    assert written[0] == written[1] != written[2]


@pytest.fixture
def tiny_char(data_dir):
    """What save() takes for a model of the data set tiny_char."""
    meta = json.loads((data_dir / "tiny_char" / "meta.json").read_text())
    return dict(tokens=meta["tokenizer"], dataset="tiny_char")


def test_against_another_run(browser, show, tmp_path, data_dir, tiny_char):
    """The default text is one that neither wrote; where one of them did, the page says so."""
    folders = [save(tmp_path / block, block=block, **tiny_char) for block in ("dva", "gpt2")]
    model, other = show(folders[0], "abc", against=folders[1], data_dir=data_dir), load(folders[1])
    tokenizer = Tokenizer(tiny_char["tokens"])
    text = browser.value("$('passage').value")
    val = np.fromfile(data_dir / "tiny_char" / "val.bin", dtype="uint16")
    assert len(text) == 48 and text in tokenizer.decode(val.tolist()).decode()
    assert "validation split of tiny_char" in browser.text("#origin")[0]
    idx = torch.tensor([tokenizer.encode(text)])
    losses = [model(idx[:, :-1], idx[:, 1:]).item() for model in (model, other)]
    assert browser.numbers(LOSSES) == pytest.approx(losses, abs=6e-4)
    assert browser.text("#losses th")[1:] == [*map(str, folders)]

    browser.click("#copy")
    assert browser.text("#origin") == ["This is a text of yours."]
    browser.click("#go", until="state.ids.length > 60")
    browser.click("#stop")
    browser.click("#copy")
    assert browser.text("#origin")[0].startswith(
        f"{folders[0]} wrote a part of this text, which favours")

    # The other one takes over all panels
    browser.choose("chosen", "1")
    assert "2 gpt2 layers" in browser.text("#model")[0]
    check_expected(browser, other, tokenizer.encode(browser.value("$('text').value"))[-48:])


def test_texts_of_documents_come_without_the_token_between_them(browser, show, tmp_path):
    text = "\n<|endoftext|>\n".join(f"{n}. " * n + "\n\nThe end." for n in range(60))
    (tmp_path / "chat.txt").write_text(text)
    folder = prepare(tmp_path, "chat", f"--input={tmp_path / 'chat.txt'}", "--tokenizer=gpt2:300")
    tokenizer = Tokenizer(read_meta(folder)["tokenizer"])
    show(dict(tokens=tokenizer.spec, dataset="chat"), "abc", data_dir=tmp_path)
    train, val = (tokenizer.decode(ids_of(folder, split)).decode().split("<|endoftext|>")
                  for split in SPLITS)
    unseen, passage, library = browser.value("(async () =>"
                                             " [data.unseen, data.passage, await libraryText()])()")
    assert unseen == max(val, key=len) and passage and unseen.startswith(passage)
    assert library == "\n".join(train)


# The beginning is outside the window, where many tokens are one piece of text
@pytest.mark.parametrize("shape, end", [(DVA, "\n"), (WORDS, "\u2028\\")], ids=["dva", "words"])
def test_text_stays_text(browser, show, tmp_path, shape, end):
    attacker = save(tmp_path / "<" / "script><img src=x onerror=alert(1)>", **shape)
    text = ATTACK + "<img>" + TEXT + end
    show(attacker, text, against=attacker, note=ATTACK)
    assert browser.value("$('text').value") == browser.copy() == text
    assert browser.text("#foot") == [ATTACK] and "<img" in browser.text("#losses")[0]
    browser.choose("passage", ATTACK)
    assert browser.value("[document.scripts.length, document.images.length]") == [5, 0]
    browser.check()


@pytest.fixture
def narrow(browser):
    browser.call("Emulation.setDeviceMetricsOverride", width=400, height=800,
                 deviceScaleFactor=1, mobile=False)
    yield browser
    browser.call("Emulation.clearDeviceMetricsOverride")


def test_what_is_typed_lies_on_its_coloured_copy(narrow, show):
    show(DVA, TEXT)
    foreign = "שלום שלום שלום שלום\nthe 你好 " * 9
    for text in (TEXT, "the\n\n\n", foreign, "Q unknown Z", ""):
        narrow.choose("text", text)
        assert narrow.value("document.documentElement.scrollWidth") <= 400
        tall, copy = narrow.value("[$('text'), $('text').previousElementSibling]"
                                  ".map(element => element.scrollHeight)")
        assert tall == copy
        assert narrow.copy() == text
    assert narrow.text("#question") == ["Nothing is before the cursor: move it, or type."]


def test_bars_of_a_list_share_one_scale(narrow, show):
    """Whatever the width of the name before them; a number twice as large has twice the length."""
    show(WORDS, "the cat sat on the mat")
    widths = narrow.value("[...document.querySelectorAll('#givers li .bar')]"
                          ".map(bar => bar.getBoundingClientRect().width)")
    parts = list(map(abs, narrow.numbers("#givers b")))
    assert [width / widths[0] for width in widths] == pytest.approx(
        [part / parts[0] for part in parts], abs=0.02)


def test_a_long_text_is_cut_with_a_line_and_stays_quick(browser, show):
    """Painting all of it for each letter took 59 s for 200 letters after 20,000."""
    show(DVA, "the cat")
    browser.value("""(() => {
      const clipboardData = new DataTransfer();
      clipboardData.setData("text", "the cat sat\\n".repeat(200000));
      $("text").dispatchEvent(new ClipboardEvent("paste", { clipboardData, cancelable: true }));
    })()""")
    browser.until(QUIET)
    assert browser.value("$('text').value.length") == 20000
    assert "The text is cut: it holds 20,000 characters." in browser.text("#remark")[0]
    painted = browser.value("""(async () => {
      let count = 0;
      const seen = new MutationObserver(list => { for (const { addedNodes } of list)
        for (const node of addedNodes) count += node.textContent.length; });
      seen.observe($("text").previousElementSibling, { childList: true });
      await proceed(20);
      return count;
    })()""")
    # The first letter takes the last colours away
    assert 20 < painted < 40 * 60


def test_the_guessing_game(browser, show, data_dir, tiny_char):
    show(dict(block="dva", **tiny_char), "abc", data_dir=data_dir)
    for tries, right in ((1, True), (2, False)):
        browser.click("#play")
        assert browser.text("#question") == ["What comes next? Guess."]
        # Nothing shows how probable a choice is: no number, no bar, no order, no colours
        choices = browser.text("#expected bdi")
        assert choices == sorted(choices, key=lambda name: name.replace("·", " "))
        assert browser.text("#expected b") == []
        assert not browser.value("$('contributions').checkVisibility()")
        place, came = browser.value("[state.place, label(game.answer)]")
        assert browser.value("data.unseen.includes("
                             "$('text').value + textOf(pieces([game.answer])))")
        guess = next(n for n, name in enumerate(choices, 1) if (name == came) == right)
        browser.click(f"#expected label:nth-child({guess}) input")
        score, = browser.text("#score")
        assert score.startswith(f"“{came}” came: {'right' if right else 'not your guess'}.")
        assert "you 1," in score and score.endswith(f"of {tries}.")
        assert browser.text("#expected b") and browser.value("state.place") == place
    # Another place or model is another question
    browser.click("#play")
    browser.value("$('text').focus()")
    browser.press("ArrowLeft", until=f"game.answer === null && {QUIET}")
    browser.click("#play")
    browser.choose("chosen", "0")
    assert browser.text("#expected b") and browser.text("#score") == [score]


@pytest.mark.parametrize("block", ["dva", "gpt2"])
def test_what_a_bank_raised_is_what_its_layer_wrote(browser, show, block):
    """The last layer's output at all positions, from one token's row alone, read by the head."""
    model = show(dict(block=block, bank_layers=1, n_head=2), "the cat sat")
    browser.choose("key", "1")                                           # the letter h
    ids, seen, wrote = CHARACTERS.encode("the cat sat"), [], []
    attn, idx = model.transformer.h[1].attn, torch.tensor([ids])
    own, whole = idx[0] == ids[1], attn.mix

    def mix(q, k, u, *rest):
        # What is put in front of W_o stays as it is, but for the values of other tokens
        seen.append(whole(q, k, u * own[:, None], *rest) / whole(q, k, u, *rest))
        return whole(q, k, u, *rest)

    attn.mix = mix
    attn.c_proj.register_forward_pre_hook(lambda module, given: (given[0] * seen[-1],))
    attn.c_proj.register_forward_hook(lambda module, given, out: wrote.append(out[0].sum(dim=0)))
    with torch.no_grad():
        model(idx)
        weight = model.transformer.ln_f.weight
        raised = model.lm_head.weight @ ((wrote[0] - wrote[0].mean()) * weight)
    best = raised[:len(ALPHABET)].topk(8).indices.tolist()
    expected = browser.value(f"{best}.map(label)")
    assert browser.text("#bank-rows p:last-child bdi") == expected


def test_a_block_that_was_changed_in_python_is_not_shown(browser, write, monkeypatch):
    """Even where the change is seen by the last of the window's positions alone."""
    class Changed(BLOCKS["dva"]):
        def forward(self, x, idx, rotary, cache=None):
            far = torch.arange(x.size(1))[:, None] > 40
            return x + (1 + 0.1 * far) * self.attn(self.ln_1(x), idx, rotary, cache)

    monkeypatch.setitem(BLOCKS, "dva", Changed)
    browser.open(write()[0])
    note, = browser.text("#note")
    assert "dva blocks in another way" in note and "class Model of tools/read.js" in note
    assert browser.value("$('main').hidden")
    with pytest.raises(AssertionError, match="exceptionThrown"):
        browser.check()


@pytest.mark.parametrize("block", ["mean", "sigmoid"])
def test_a_block_that_the_page_does_not_know(browser, write, tmp_path, block):
    """What Python can say of it: probabilities, gradient times input, attention if there is any."""
    page, out = write(dict(block=block, n_head=2))
    assert "gradient times input" in out
    browser.open(page)
    assert browser.text("#note") == [""] and f"“{block}”" in browser.text("#model")[0]
    model, ids, embedding = load(tmp_path / "run"), CHARACTERS.encode(TEXT[:40]), []
    second = check_expected(browser, model, ids).topk(2).indices[1].item()
    model.transformer.wte.register_forward_hook(
        lambda module, given, out: embedding.append(out.detach().requires_grad_()) or embedding[0])
    logit = model(torch.tensor([ids]))[0, -1, second]
    gradient, = torch.autograd.grad(logit, embedding)
    parts = (gradient * embedding[0])[0].sum(dim=-1)
    browser.click("#expected label:nth-child(2) input", until="true")
    assert contributed(browser) == pytest.approx(parts.tolist(), abs=6e-4)
    assert browser.numbers("#sum td")[1:] == pytest.approx(
        [logit.item(), logit.item() - parts.sum().item()], abs=1e-4)
    assert browser.value("$('weights').checkVisibility()") == (block == "sigmoid")
    assert not browser.value("$('go').checkVisibility() || $('teach').checkVisibility()")


def test_the_page_in_docs_still_works(browser):
    page = ROOT / "docs" / "try.html"
    assert page.stat().st_size < 1_500_000
    # It is the page of today: python -m tools.explain, as make try calls it, writes it again
    for script in ROOT.glob("tools/*.js"):
        assert script.read_text() in page.read_text(), script
    browser.open(page)
    assert browser.text("#note") == [""] and len(browser.text("#expected b")) == 10
