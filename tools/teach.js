// Teaching: the panel that trains a model on a text, shows how it learns, and saves it. What
// learns is in learn.js.
"use strict";
// The page as it came, to be saved again with another model in it
const pristine = document.documentElement.cloneNode(true);
const lesson = { text: "", name: "", runs: [], moments: [], isPaused: false, began: 0, rested: 0 };

const MOST_LESSON = 3e6;
const bytesOfBase64 = text => Uint8Array.from(atob(text), letter => letter.charCodeAt(0));
const kernelsOfThePage = () => data.kernels.map(bytesOfBase64);
const elapsed = () => (performance.now() - lesson.began - lesson.rested) / 1000;
const complain = ({ message }) => { $("trouble").textContent = message; };

// ---- the text and the settings -----------------------------------------------------------------

async function inflate(bytes) {
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Response(stream).text();
}
async function libraryText() {
  const packed = $("library").textContent;
  return packed && inflate(bytesOfBase64(packed));
}
// The text to learn: what is pasted, dropped, chosen or typed, and else the one that the page holds
async function setLesson(given, name) {
  // As a text field does
  const text = given.replace(/\r\n?/g, "\n");
  Object.assign(lesson, text ? { text: text.slice(0, MOST_LESSON), name }
    : { text: await libraryText(), name: `this page's part of ${data.title}` });
  // A field of a few thousand characters stays quick
  $("lesson").readOnly = text.length > 3000;
  if (!text || text.length > 3000) $("lesson").value = text.slice(0, 3000);
  if ($("teach").firstElementChild.open) await suggest();
}
const readFile = async file => file && setLesson(await file.text(), file.name);
$("teach").ondragover = event => event.preventDefault();
$("teach").ondrop = event => {
  event.preventDefault();
  readFile(event.dataTransfer.files[0]).catch(complain);
};
$("lesson").onpaste = event => {
  const text = event.clipboardData.getData("text");
  if (text.length < 3000) return;
  event.preventDefault();
  setLesson(text, "your text").catch(complain);
};

function settingsOf(block = $("block").value) {
  const own = { block, n_layer: +$("layers").value, n_embd: +$("width").value,
                steps: +$("steps").value, seed: +$("lesson-seed").value, text: lesson.text };
  if (block !== "page") return own;
  const { config, vocab } = models[0];
  if (vocab.isBytePair || config.bias)
    throw Error("This page's model has biases or tokens of several letters: such a model goes on "
      + "learning in Python alone, with train.py --init_from");
  return { ...own, ...config, vocab: vocab.tokens, weights: weightsOf(models[0]),
           learning_rate: 3e-3 };
}
// Seconds that a step of so many workers will take here: three are tried
async function measure(settings, workers = workersFor(settings)) {
  const trial = new Lesson({ ...settings, probe: workers,
    batch_size: Math.ceil((settings.batch_size ?? DEFAULTS.batch_size) / workers) });
  try {
    return (await trial.done).seconds;
  } finally {
    trial.end();
  }
}
// With `isNew`, as many steps as take about 40 seconds, or read the text 30 times
const suggest = (isNew = true) => work("suggest", async job => {
  const { text, name } = lesson;
  $("about").textContent = !text ? "Paste a text first." : `${name}: ${
    text.length.toLocaleString("en")} characters, of ${alphabetOf(codesOf(text)).length} kinds. `
    + "A tenth is kept back for validation.";
  $("plan").textContent = "";
  for (const id of ["layers", "width"]) $(id).disabled = $("block").value === "page";
  if (!text) return;
  try {
    const seconds = await measure(settingsOf());
    if (job.over) throw job;
    const { batch_size, block_size } = { ...DEFAULTS, ...settingsOf() };
    const most = 30 * text.length / (batch_size * block_size);
    if (isNew) $("steps").value = 50 * Math.ceil(Math.min(40 / seconds, Math.max(100, most)) / 50);
    $("plan").textContent = `about ${Math.ceil($("steps").value * seconds)} s here`;
    complain({ message: "" });
  } catch (error) {
    if (error === job) throw error;
    complain(error);
  }
});

// ---- training ----------------------------------------------------------------------------------

const blockNames = { dva: "dva", gpt2: "gpt2 with rotary positions", page: "this page's model" };
function begin(blocks, stepsOf = () => +$("steps").value) {
  for (const run of lesson.runs) run.lesson.end();
  lesson.runs = [];
  Object.assign(lesson, { moments: [], isPaused: false, isTimed: false, rested: 0,
                          began: performance.now() });
  const workers = Math.max(1, Math.floor(workersFor({}) / blocks.length));
  $("moment").value = $("moment").max = 0;
  for (const id of ["written", "slept", "trouble"]) $(id).textContent = "";
  try {
    for (const block of blocks) {
      const run = { block, name: blockNames[block], source: lesson.name, losses: [], vals: [],
                    at: 0 };
      run.lesson = new Lesson({ ...settingsOf(block), steps: stepsOf(block), workers },
                              message => hear(run, message));
      run.lesson.done.catch(complain);
      lesson.runs.push(run);
    }
    showProgress();
  } catch (error) {
    complain(error);
  }
}
function hear(run, message) {
  const { step, loss, val, weights, isLast } = message, at = elapsed();
  // A device that sleeps stops its workers, and wakes them where they were. The last step takes as
  // long as the validation split is.
  if (run.at && !isLast && at - run.at > 10 + 20 * run.at / (step + 1)) {
    lesson.rested += 1000 * (at - run.at);
    $("slept").textContent = `The device slept for ${Math.round(at - run.at)} s. Nothing is lost.`;
  }
  run.at = elapsed();
  run.step = step;
  if (Number.isNaN(loss)) complain({ message: "The loss is no longer a number: try another seed." });
  if (loss) run.losses.push([run.at, loss]);
  if (val) run.vals.push([run.at, val]);
  // The curve's points are of some windows, always the same
  if (isLast) Object.assign(run, { isOver: true, whole: message.whole });
  // Soon both have shown their speed, and the race can end for both at the same time
  const [{ lesson: { settings: { steps } } }, other] = lesson.runs;
  if (!lesson.isTimed && step >= steps / 5 && run !== other && other?.step >= 3) {
    lesson.isTimed = true;
    goTo(other, Math.round(other.step / step * steps));
  }
  if (weights) addMoment(run, step, val, weights);
  showProgress();
}
function order(orders) {
  for (const run of lesson.runs) run.lesson.order(orders);
}
function pause() {
  lesson.isPaused = !lesson.isPaused;
  if (lesson.isPaused) lesson.pausedAt = performance.now();
  else lesson.rested += performance.now() - lesson.pausedAt;
  order({ isPaused: lesson.isPaused });
  showProgress();
}
// As many steps again, from a high rate down to a low one
function goOn() {
  lesson.rested += 1000 * (elapsed() - Math.max(...lesson.runs.map(({ at }) => at)));
  for (const run of lesson.runs) {
    run.isOver = false;
    goTo(run, run.step + +$("steps").value);
  }
  showProgress();
}
function goTo(run, until) {
  run.lesson.settings.steps = until;
  run.lesson.order({ until });
}
// Both blocks, with the same batches and as many seconds: the same widths, and steps by their speed
async function race() {
  $("progress").textContent = "Timing both …";
  try {
    const blocks = ["dva", "gpt2"], workers = Math.max(1, workersFor({}) >> 1);
    const [dva, gpt2] = await Promise.all(blocks.map(block => measure(settingsOf(block), workers)));
    begin(blocks, block => Math.round($("steps").value * (block === "dva" ? 1 : dva / gpt2)));
  } catch (error) {
    complain(error);
  }
}

function showProgress() {
  if (lesson.frame || !lesson.runs.length) return;
  lesson.frame = setTimeout(() => {
    const { runs, isPaused } = lesson, isOver = isAllOver(), last = list => list.at(-1)?.[1];
    lesson.frame = 0;
    $("pause").disabled = isOver;
    $("pause").textContent = isPaused ? "Go on" : "Pause";
    $("more").disabled = !isOver || runs.length > 1;
    $("verdict").hidden = runs.length < 2 || !isOver;
    const lines = runs.map(({ name, step = 0, at, losses, vals, lesson: { settings }, ...run }) =>
      `${name}: ${step} of ${settings.steps} steps, ${(step / at || 0).toFixed(1)} a second; loss ${
        last(losses)?.toFixed(3) ?? "…"}, validation ${run.isOver
        ? `${run.whole.toFixed(3)} on all of it.` : `${last(vals)?.toFixed(3) ?? "…"}.`}`);
    $("progress").textContent = lines.join(" ") + (isPaused ? " Paused." : "");
    drawCurves(runs);
  }, 100);
}
const isAllOver = () => lesson.runs.every(run => run.isOver);
const stepsDone = () => total(lesson.runs.map(({ step = 0 }) => step));
document.addEventListener("visibilitychange", () => {
  if (document.hidden) lesson.stepsBefore = stepsDone();
  else if (stepsDone() > lesson.stepsBefore)
    $("slept").textContent = "It went on while this tab was in the background.";
});

// The losses over the seconds: thin for the batches, smoothed, thick for the validation split
function drawCurves(runs) {
  const W = 600, H = 200, smooth = list => list.map(([x], n) => {
    const near = list.slice(Math.max(0, n - 9), n + 1);
    return [x, near.reduce((sum, [, y]) => sum + y, 0) / near.length];
  });
  const lines = runs.flatMap(({ block, losses, vals }) => {
    const thin = smooth(losses), step = Math.ceil(thin.length / 300) || 1;
    return [[block, "thin", thin.filter((_, n) => n % step === 0)], [block, "thick", vals]];
  });
  const all = lines.flatMap(([, , list]) => list), right = Math.max(1, ...all.map(([x]) => x));
  const ys = all.map(([, y]) => y), low = Math.min(...ys), high = Math.max(low + 0.1, ...ys);
  const place = ([x, y]) => [x / right * W, (high - y) / (high - low) * H].map(Math.round).join();
  const made = (kind, attributes, text = "") => {
    const node = document.createElementNS("http://www.w3.org/2000/svg", kind);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    node.textContent = text;
    return node;
  };
  if (!all.length) return;
  $("curves").replaceChildren(...lines.map(([block, kind, list]) =>
    made("polyline", { points: list.map(place).join(" "), class: `${kind} of-${block}` })),
    ...[0, 1, 2].map(n => made("text", { x: -6, y: n * H / 2 + 4, "text-anchor": "end" },
                               (high - n * (high - low) / 2).toFixed(2))),
    made("text", { x: W, y: H + 24, "text-anchor": "end" }, `${right.toFixed(0)} s`));
}

// ---- moments: the weights of then, for all panels ----------------------------------------------

// A model's parameters in the order of shapesOf()
function weightsOf({ config, parameters, numbers }) {
  const found = {};
  let at = 0;
  for (const [path, count] of parameters) found[path] = numbers.subarray(at, at += count);
  return Float32Array.from(Object.keys(shapesOf(config)).flatMap(path => [...found[path]]));
}
function modelOf({ source, lesson: { config, tokens, val } }, name, numbers) {
  const startOf = count => Array.from(val.subarray(0, count), id => tokens[id]).join("");
  return new Model({ name, config, numbers, dataset: source,
    passage: startOf(256), unseen: startOf(3000),
    vocab: vocabOf({ tokens, kind: "char", size: tokens.length }), parameters:
    Object.entries(shapesOf(config)).map(([path, [rows, width]]) => [path, rows * width]) });
}
function addMoment(run, step, val, weights) {
  const name = lesson.runs.length > 1 ? `your ${run.block}` : "your model";
  lesson.moments.push({ run, step, val, weights, name });
  const slider = $("moment"), wasLast = +slider.value >= slider.max;
  slider.max = lesson.moments.length - 1;
  slider.disabled = $("think").disabled = $("as-page").disabled = $("as-zip").disabled = false;
  if (!wasLast && +slider.max) return;
  slider.value = slider.max;
  showMoment();
}
// What the model of this moment writes, always by the same random numbers
const showMoment = () => work("moment", async job => {
  const moment = lesson.moments[$("moment").value], { run, step, name } = moment;
  $("when").textContent = `${lesson.runs.length > 1 ? `${run.block}, ` : ""}step ${step}`;
  if (!moment.written) {
    const model = modelOf(run, name, moment.weights), written = [];
    const ids = [Math.max(0, run.lesson.tokens.indexOf("\n"))];
    const next = writeOn(model, model.memory(), ids, 0.8, randomOf(7), job);
    while (written.length < 160) written.push(model.vocab.spelling[(await next.next()).value]);
    moment.written = written.join("");
  }
  $("written").textContent = moment.written;
});
function chosenModel() {
  const { run, name, weights } = lesson.moments[$("moment").value];
  return modelOf(run, name, weights);
}
// All panels show the model of this moment, and the test takes a text that it has not seen
function think() {
  const model = chosenModel();
  data.unseen = model.unseen;
  $("passage").value = model.passage;
  $("play").hidden = false;
  addModel(model);
  $("text").scrollIntoView({ block: "center" });
}

// ---- take it home ------------------------------------------------------------------------------

function download(name, ...parts) {
  const link = Object.assign(element("a"), { download: name,
    href: URL.createObjectURL(new Blob(parts)) });
  link.click();
}
// 16 bits of a number: a sign, 5 bits of exponent, 10 of fraction
function toHalf(x) {
  const size = Math.abs(x), sign = x < 0 ? 0x8000 : 0;
  if (size >= 65520) throw Error("a weight is above 65504: has the training diverged?");
  if (size < 2 ** -14) return sign | Math.round(size * 2 ** 24);
  let exponent = Math.floor(Math.log2(size));
  if (2 ** exponent > size) exponent--;
  return (sign | (exponent + 14) * 1024) + Math.round(size * 2 ** (10 - exponent));
}
function base64(bytes) {
  let text = "";
  for (const byte of bytes) text += String.fromCharCode(byte);
  return btoa(text);
}
// This page, with another model: a string of HTML
function pageOf(model) {
  const { name, config, dataset, parameters, numbers, vocab, passage, unseen } = model;
  const stored = { name, config, dataset, parameters, passage,
    numbers: base64(new Uint8Array(Uint16Array.from(numbers, toHalf).buffer)) };
  const read = new Model({ ...stored, vocab }), memory = read.memory();
  const ids = idsOf(model, unseen).slice(0, config.block_size);
  for (const id of ids) read.read(memory, id);
  stored.check = { ids, logits: [...read.logits(memory, ids.length - 1)].slice(0, 64) };
  const { kind, tokens, size } = vocab, copy = { ...data, models: [stored], kind, tokens, size,
    passage, unseen, start: "\n", write: 120, foot: `Trained in a browser on ${dataset}.` };
  const page = pristine.cloneNode(true);
  // No text in the data can end the script element that holds it
  page.querySelector("#data").textContent = JSON.stringify(copy).replaceAll("<", "\\u003c");
  return `<!doctype html>\n${page.outerHTML}`;
}
const idsOf = ({ vocab }, text) =>
  Array.from(text.slice(0, 2000), letter => vocab.idOf.get(letter)).filter(id => id !== undefined);

// The two files of a folder that --init_from and sample.py read: {name: bytes}
function folderOf(model) {
  const { config, vocab, parameters, numbers } = model, shapes = shapesOf(config), header = {};
  let at = 0;
  for (const [path, count] of parameters) {
    const [rows, width] = shapes[path], isScalar = path.endsWith("gamma");
    header[path] = { dtype: "F32", shape: isScalar ? [] : rows > 1 ? [rows, width] : [width],
                     data_offsets: [4 * at, 4 * (at += count)] };
  }
  const head = new TextEncoder().encode(JSON.stringify(header)), length = roundUp(head.length, 8);
  const bytes = new Uint8Array(8 + length + 4 * at).fill(32, 8, 8 + length);
  new DataView(bytes.buffer).setUint32(0, length, true);
  bytes.set(head, 8);
  bytes.set(new Uint8Array(numbers.buffer, numbers.byteOffset, 4 * at), 8 + length);
  const tokenizer = { kind: "char", alphabet: vocab.tokens.join("") };
  const settings = JSON.stringify({ model_config: config, tokenizer }, null, 1);
  return { "model.safetensors": bytes, "config.json": new TextEncoder().encode(settings) };
}
// A zip of files that are not compressed
function zipOf(files) {
  const table = Int32Array.from({ length: 256 }, (_, n) => {
    for (let bit = 0; bit < 8; bit++) n = n & 1 ? n >>> 1 ^ 0xedb88320 : n >>> 1;
    return n;
  });
  const local = [], central = [], little = (...pairs) => pairs.flatMap(([size, x]) =>
    Array.from({ length: size }, (_, n) => x / 256 ** n & 255));
  let at = 0;
  for (const [name, bytes] of Object.entries(files)) {
    let crc = -1;
    for (const byte of bytes) crc = crc >>> 8 ^ table[(crc ^ byte) & 255];
    const letters = [...new TextEncoder().encode(name)];
    const shared = little([2, 20], [2, 0], [2, 0], [4, 0x210000], [4, ~crc >>> 0],
                          [4, bytes.length], [4, bytes.length], [2, letters.length], [2, 0]);
    const head = [...little([4, 0x04034b50]), ...shared, ...letters];
    local.push(Uint8Array.from(head), bytes);
    central.push(Uint8Array.from([...little([4, 0x02014b50], [2, 20]), ...shared,
                                  ...little([2, 0], [2, 0], [2, 0], [4, 0], [4, at]), ...letters]));
    at += head.length + bytes.length;
  }
  const size = central.reduce((all, { length }) => all + length, 0);
  const end = little([4, 0x06054b50], [4, 0], [2, central.length], [2, central.length], [4, size],
                     [4, at], [2, 0]);
  return [...local, ...central, Uint8Array.from(end)];
}
const saveAsPage = () => download("my-model.html", pageOf(chosenModel()));
const saveAsZip = () => download("my-model.zip", ...zipOf(Object.fromEntries(
  Object.entries(folderOf(chosenModel())).map(([name, bytes]) => [`my-model/${name}`, bytes]))));

start();
if (!data.recorded) setLesson("").catch(complain);
