"""The page that learns: in a real browser, compared with autograd and nanodva/optimizers.py."""
import base64
import io
import json
import shutil
import subprocess
import zipfile

import numpy as np
import pytest
import torch
from browser import differ
from conftest import ROOT, SHAKESPEARE, records, save_run, shaken, tiny, tokens
from torch.nn.utils import clip_grad_norm_

import train
from nanodva.optimizers import build_optimizer, set_learning_rate
from nanodva.tokenizer import Tokenizer
from nanodva.weights import load_model
from tools import explain as tool

# For lessons in the page that take a second
QUICK = dict(n_layer=1, n_embd=32, qk_dim=16, block_size=32, batch_size=8, steps=20)
TEXT = "".join(f"{n} times {m} is {n * m}.\n" for n in range(1, 20) for m in range(1, 20))


def build(**system):
    """A small model; widths are multiples of 8."""
    shape = dict(n_layer=2, n_embd=32, n_head=2, qk_dim=8, block_size=16, vocab_size=37, bias=False)
    return tiny(**shape | system)


@pytest.fixture(scope="module")
def page(browser, tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    alphabet = "".join(sorted(set(TEXT)))
    model = build(block="dva", rotary="only", bank_layers=1, vocab_size=len(alphabet))
    tokens = Tokenizer({"kind": "char", "alphabet": alphabet}).spec
    run = save_run(folder / "run", shaken(model), tokens)
    tool.main([f"--out_dir={run}", "--start=\n", "--max_new_tokens=0"])
    browser.home = run / "explain.html"
    browser.open(browser.home)
    return browser


def learn(page, settings, text=TEXT, also=""):
    """What teach() gives, after more time perhaps than the browser has for an answer."""
    page.value(f"window.result = undefined;"
               f"teach({{...{json.dumps(settings)}, text: {json.dumps(text)}, {also}}}).then("
               f"({{ weights, ...rest }}) => {{ result = {{ ...rest, weights: [...weights] }}; }},"
               f"({{ message }}) => {{ result = {{ error: message }}; }}); 0")
    page.until("window.result !== undefined")
    return page.value("result")


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


def steps(page, model, batches, rates, settings, kernels=0, wanted="step"):
    weights = {name: p.flatten().tolist() for name, p in model.named_parameters()}
    flat = [[x.flatten().tolist(), y.flatten().tolist()] for x, y in batches]
    arguments = json.dumps([tool.resolved(model.config), weights, flat, batches[0][0].size(1),
                            rates, settings, kernels])
    return page.value(f"{STEPS}(...{arguments}).map(step => {wanted})")


# ---- gradients and steps -------------------------------------------------------------------------

@pytest.mark.parametrize("B, T, kernels", [(6, 16, 0), (40, 16, 1), (40, 8, "none")])
@pytest.mark.parametrize("system", [
    dict(block="dva"), dict(block="dva", rotary="only", bank_layers=1),
    dict(block="dva", rotary=False, value_norm=False, value_dim=24, bank_layers=1),
    dict(block="gpt2"), dict(block="gpt2", rotary=True, gelu="tanh", bank_layers=1),
    dict(block="gpt2", rotary="only")], ids=str)
def test_gradients_are_autograds_and_steps_are_those_of_python(page, system, B, T, kernels):
    """Muon for matrices, tall ones, too, and AdamW for the rest; with each of the three kernels."""
    model, rates = shaken(build(**system)), [2e-3, 1e-3]
    batches = [(ids[:, :-1], ids[:, 1:]) for ids in (tokens(B, T + 1, seed=n) for n in range(2))]
    settings = dict(grad_clip=0.5, embedding_lr=3.0, bank_lr=7.0, weight_decay=0.3, beta2=0.99)
    found = steps(page, model, batches, rates, settings, kernels)
    cfg = train.TrainConfig(optimizer="muon", dtype="float32", **settings)
    optimizer = build_optimizer(model, cfg)
    for (x, y), lr, step in zip(batches, rates, found, strict=True):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        loss = model(x, y)
        loss.backward()
        assert step["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert step["grads"].keys() == step["weights"].keys() == before.keys()
        for name, p in model.named_parameters():
            assert not p.requires_grad or differ(step["grads"][name], p.grad) < 1e-4, name
        clip_grad_norm_(model.parameters(), cfg.grad_clip)
        set_learning_rate(optimizer, lr)
        optimizer.step()
        optimizer.zero_grad()
        for name, p in model.named_parameters():
            after = torch.tensor(step["weights"][name]).view_as(p)
            assert differ(after, p) < 1e-5, name
            if p.requires_grad:
                assert differ(after - before[name], p - before[name]) < 2e-2, name
            p.data.copy_(after)


@pytest.mark.parametrize("block", ["dva", "gpt2"])
def test_thirty_steps_lose_what_train_py_loses(page, run, data_dir, tmp_path, block):
    """The same weights and batches; the page's learning rates follow train.py's schedule."""
    folder = data_dir / "tiny_char"
    meta = json.loads((folder / "meta.json").read_text())
    model = build(block=block, rotary="only", n_embd=16, vocab_size=meta["vocab_size"])
    settings = dict(block=block, batch_size=8, max_iters=30, learning_rate=1e-2, min_lr=1e-3,
                    lr_decay_iters=30, warmup_iters=5, dropout=0.0, gradient_accumulation_steps=1)
    run(**settings, rotary="only", bias=False, optimizer="muon", eval_interval=30, eval_iters=1,
        init_from=save_run(tmp_path / "start", model, meta["tokenizer"]))
    expected = [line["train_loss"] for line in records(tmp_path / "out") if "train_loss" in line]
    data = np.memmap(folder / "train.bin", dtype="uint16", mode="r")
    cfg = train.TrainConfig(**settings, block_size=16, vocab_size=meta["vocab_size"])
    batches = [train.get_batch(data, cfg, step, 0, torch.device("cpu")) for step in range(30)]
    rates = page.value("Array.from({ length: 30 }, (_, n) => rateAt(n, 30,"
                       " { learning_rate: 1e-2, min_lr: 1e-3, warmup: 5 }))")
    found = steps(page, model, batches, rates, dict(beta2=0.95, embedding_lr=1),
                  wanted="step.loss")
    assert found == pytest.approx(expected, abs=1e-3)
    assert found[-1] < found[0] - 0.3


@pytest.mark.parametrize("block", ["dva", "gpt2"])
def test_workers_and_kernels_change_nothing(page, block):
    first = learn(page, QUICK | dict(block=block), also="workers: 1")
    assert len(first["losses"]) == 20 and first["losses"][-1] < first["losses"][0] - 0.5
    for also in ("workers: 3", "workers: 2, modules: []"):
        other = learn(page, QUICK | dict(block=block), also=also)
        assert other["losses"] == pytest.approx(first["losses"], abs=1e-5), also
        assert other["val_loss"] == pytest.approx(first["val_loss"], abs=1e-5), also
    # Another seed is another run, the same one is the same
    assert learn(page, QUICK | dict(block=block, seed=2))["losses"] != first["losses"]
    again = learn(page, QUICK | dict(block=block), also="workers: 2, modules: []")
    assert again["weights"] == other["weights"]


@pytest.mark.parametrize("changes, text, message", [
    (dict(n_embd=20), TEXT, "n_embd is 20: here it must be a multiple of 8"),
    (dict(block="gpt2", n_embd=48), TEXT, "n_embd / n_head is 12"),
    (dict(value_dim=12), TEXT, "value_dim is 12"),
    ({}, "too short", "the text has 9 characters, and needs more than 330"),
    ({}, "", "the text has 0 characters"),
    # What no memory holds is found by a worker
    (dict(n_layer=12, n_embd=16384), TEXT, "a worker has stopped: Uncaught RangeError"),
    (dict(vocab=list("0123456789")), TEXT, "does not know “ ")])
def test_what_the_page_cannot_learn_is_one_line(page, changes, text, message):
    assert message in learn(page, QUICK | changes, text)["error"]


def test_the_kernels_are_their_source(tmp_path):
    assembler = shutil.which("asc") or shutil.which("asc", path=ROOT / "node_modules" / ".bin")
    if not assembler:
        pytest.skip("no assembler on this machine: npm install assemblyscript@0.28.20")
    for name, more in (("kernel", []), ("kernel_relaxed", ["--enable", "relaxed-simd"])):
        made = tmp_path / f"{name}.wasm"
        subprocess.run([assembler, "tools/kernel.ts", "-o", made, "-O3", "--runtime", "stub",
                        "--importMemory", "--enable", "simd", *more], cwd=ROOT, check=True)
        assert made.read_bytes() == (ROOT / "tools" / f"{name}.wasm").read_bytes()


# ---- the panel -----------------------------------------------------------------------------------

IS_OVER = "lesson.runs.length > 0 && lesson.runs.every(run => run.isOver)"


@pytest.fixture
def panel(page):
    """The page anew, its panel open, with QUICK's sizes as the defaults of a lesson."""
    page.open(page.home)
    page.value(f"Object.assign(DEFAULTS, {json.dumps(QUICK)});"
               "$('layers').value = 1; $('width').value = 32; 0")
    page.click("#teach summary")
    return page


def give(panel, steps=20):
    panel.choose("lesson", TEXT)
    panel.until("$('plan').textContent.startsWith('about')")
    panel.value(f"$('steps').value = {steps}; 0")


def train_there(panel, block="dva", steps=20):
    give(panel, steps)
    panel.value(f"begin(['{block}']); 0")
    panel.until(IS_OVER)


def test_a_lesson_by_hand(panel):
    give(panel)
    known = f"your text: {len(TEXT):,} characters, of {len(set(TEXT))} kinds"
    assert panel.text("#about")[0].startswith(known)
    panel.click("#teach button.main", until=IS_OVER)
    panel.until("$('progress').textContent.includes('20 of 20 steps')")
    assert "on all of it" in panel.text("#progress")[0]
    # Each moment has the text that its weights write, and the panels take them over
    found = []
    for moment in (panel.value("$('moment').max"), "0"):
        panel.choose("moment", moment)
        panel.click("#think")
        found.append(panel.text("#written") + panel.text("#expected b"))
        assert len(found[-1]) == 11 and len(found[-1][0]) == 160
    assert found[0][0] != found[1][0] and found[0][1:] != found[1][1:]
    assert panel.text("#when") == ["step 0"] and "your text" in panel.text("#origin")[0]
    assert panel.text("#model")[0].startswith("your model: 1 dva layers")
    # More steps go on from there
    panel.click("#more", until=IS_OVER + " && lesson.runs[0].step === 40")
    panel.until("$('progress').textContent.includes('40 of 40 steps')")
    assert panel.value("lesson.runs[0].losses.length") == 40


def test_a_model_keeps_the_text_that_it_was_trained_on(panel):
    train_there(panel, steps=5)
    panel.value(r"setLesson('b\r\nc\rd', 'other.txt'); 0")
    panel.until("$('trouble').textContent.startsWith('the text has 5 characters')")
    assert panel.value("lesson.text") == "b\nc\nd"
    unseen = TEXT[int(0.9 * len(TEXT)):]
    saved = panel.value("""(() => {
      const page = new DOMParser().parseFromString(pageOf(chosenModel()), "text/html");
      const { models: [{ dataset, passage }], ...data } = JSON.parse(
        page.getElementById("data").textContent);
      return [dataset, passage, data.passage, data.unseen, data.foot];
    })()""")
    assert saved == ["your text", unseen[:256], unseen[:256], unseen[:3000],
                     "Trained in a browser on your text."]
    panel.click("#think")
    assert panel.text("#model")[0].partition("trained on ")[2].startswith("your text.")
    assert "validation split of your text, which it was not" in panel.text("#origin")[0]
    panel.choose("chosen", "0")
    assert "validation split of your text." in panel.text("#origin")[0]


def begin_and_pause(panel):
    """Pause from within the page: a fast machine is done before a click gets there."""
    give(panel, steps=300)
    panel.value("begin(['dva']); 0")
    panel.value("""new Promise(resolve => { const timer = setInterval(() => {
      if (!(lesson.runs[0].step > 2)) return;
      clearInterval(timer);
      pause();
      resolve();
    }, 1); })""")


def test_pause_and_go_on_change_nothing(panel):
    straight = learn(panel, QUICK | dict(steps=300), also="workers: 2")["losses"]
    begin_and_pause(panel)
    panel.until("$('progress').textContent.endsWith('Paused.')")
    at = panel.value("new Promise(resolve => setTimeout(() => { const step = lesson.runs[0].step;"
                     " setTimeout(() => resolve([step, lesson.runs[0].step]), 300); }, 300))")
    assert at[0] == at[1] < 300
    # The page shows the model of the moment at which it was paused
    assert panel.value("lesson.moments.at(-1).step") == at[0]
    panel.click("#pause", until=IS_OVER)
    found = panel.value("lesson.runs[0].losses.map(([, loss]) => loss)")
    assert found == pytest.approx(straight, abs=1e-5)


def test_a_hidden_tab_and_a_sleeping_device_lose_nothing(panel):
    begin_and_pause(panel)
    with panel.another_tab():
        panel.until("document.hidden")
        panel.value("pause(); 0")
        panel.until(IS_OVER)
    panel.until("$('slept').textContent === 'It went on while this tab was in the background.'")
    # Nothing went on
    panel.value("$('slept').textContent = ''; 0")
    with panel.another_tab():
        panel.until("document.hidden")
    panel.until("!document.hidden")
    # The last step takes an hour, with all of the validation split
    panel.value("lesson.began -= 3600e3;"
                "hear(lesson.runs[0], { step: 300, isLast: true, whole: 1 });"
                "lesson.began += 3600e3; lesson.runs[0].at -= 3600; 0")
    assert panel.text("#slept") == [""]
    # The next message comes an hour later
    panel.value("lesson.began -= 3600e3; hear(lesson.runs[0], { step: 301, loss: 1 }); 0")
    slept, = panel.text("#slept")
    assert slept.startswith("The device slept for 36") and slept.endswith("Nothing is lost.")
    assert panel.value("lesson.runs[0].at") < 600


def test_a_race_gives_both_the_same_seconds(panel):
    give(panel, steps=40)
    panel.click("#teach button:nth-of-type(4)", until=IS_OVER)
    dva, gpt2 = panel.value("lesson.runs.map(({ block, losses }) => [block, losses.length])")
    assert dva == ["dva", 40] and gpt2[0] == "gpt2" and 0 < gpt2[1] <= 60
    panel.until("!$('verdict').hidden")
    assert panel.value("document.querySelectorAll('#curves polyline').length") == 4


def test_the_model_of_the_page_learns_on(panel):
    panel.choose("block", "page")
    train_there(panel, "page")
    # It begins with the weights of the page's model
    assert panel.value("weightsOf(models[0]).every((x, n) => lesson.moments[0].weights[n] === x)")
    first, *_, last = panel.value("lesson.runs[0].vals.map(([, loss]) => loss)")
    assert last < first - 0.1
    assert panel.value("lesson.runs[0].lesson.settings.bank_layers") == 1
    panel.choose("lesson", TEXT + "你好")
    panel.until("$('trouble').textContent.includes('does not know “你好”')")


def test_text_to_learn_stays_text(panel):
    attack = "</script><script>alert(1)</script><img src=x onerror=alert(1)>" * 20
    panel.value(f"setLesson({json.dumps(attack)}, '<img src=x onerror=alert(2)>'); 0")
    panel.until("$('plan').textContent.startsWith('about')")
    panel.value("$('steps').value = 20; begin(['dva']); 0")
    panel.until(IS_OVER)
    panel.click("#think")
    hostile = panel.home.with_name("hostile.html")
    hostile.write_text(panel.value("pageOf(chosenModel())"))
    panel.open(hostile)
    assert panel.text("#note") == [""] and panel.value("document.images.length") == 0
    panel.check()


@pytest.mark.parametrize("block", ["dva", "gpt2"])
def test_what_was_learned_goes_home(panel, tmp_path, block):
    logits_of = """(model => {
      const memory = model.memory(), ids = idsOf(model, lesson.text || data.passage).slice(0, 30);
      for (const id of ids) model.read(memory, id);
      return [ids, ids.map((_, i) => [...model.logits(memory, i)])];
    })"""
    train_there(panel, block)
    ids, logits = panel.value(f"{logits_of}(chosenModel())")
    saved, name, packed = panel.value("""(async () => {
      const model = chosenModel(), zip = new Blob(zipOf(folderOf(model)));
      return [pageOf(model), model.name, base64(new Uint8Array(await zip.arrayBuffer()))];
    })()""")
    zipfile.ZipFile(io.BytesIO(base64.b64decode(packed))).extractall(tmp_path / "mine")
    model = load_model(tmp_path / "mine").eval()
    assert model.tokenizer.decode(ids).decode() == TEXT[:30]
    with torch.no_grad():
        expected = model(torch.tensor([ids]))[0]
    assert differ(logits, expected) < 1e-4
    tool.main([f"--out_dir={tmp_path / 'mine'}", "--start=1", f"--dest={tmp_path / 'again.html'}"])

    (tmp_path / "saved.html").write_text(saved)
    panel.open(tmp_path / "saved.html")
    assert panel.text("#note") == [""]
    assert panel.text("#model")[0].startswith(f"{name}: 1 {block} layers")
    panel.click("#teach summary")
    panel.choose("block", "page")
    train_there(panel, "page", steps=5)
    # Its weights have 16 bits
    ids_again, logits = panel.value(f"{logits_of}(models[0])")
    assert ids_again == ids and differ(logits, expected) < 1e-2


@pytest.mark.slow
def test_the_speedrun_in_a_browser(page):
    """config/speedrun.py's model ends at most at 1.886 on the whole validation split."""
    if SHAKESPEARE is None:
        pytest.skip("no Tiny Shakespeare on this machine")
    page.open(page.home)
    assert learn(page, {}, SHAKESPEARE.read_text())["val_loss"] <= 1.886
