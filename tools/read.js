// Reading: what a trained model expects, and which tokens contributed to it. The model reads one
// token at a time here, in 64 bits, and keeps all that its explanation needs.
"use strict";
const $ = id => document.getElementById(id);
const stopped = error => { $("note").textContent = `The page has stopped: ${error.message}`; };
window.addEventListener("error", event => stopped(event.error ?? event));
window.addEventListener("unhandledrejection", event => stopped(event.reason));
const data = JSON.parse($("data").textContent), models = [];

// ---- vectors: lists of numbers of 64 bits ------------------------------------------------------

// W x + b, where a matrix is one list, row after row
function linear({ weight, bias }, x) {
  const y = new Float64Array(weight.length / x.length);
  for (let r = 0, at = 0; r < y.length; r++) {
    let sum = bias ? bias[r] : 0;
    for (let n = 0; n < x.length; n++) sum += weight[at++] * x[n];
    y[r] = sum;
  }
  return y;
}
// W^T y: the way back through the same matrix
function back({ weight }, y) {
  const x = new Float64Array(weight.length / y.length);
  for (let r = 0, at = 0; r < y.length; r++)
    for (let n = 0; n < x.length; n++) x[n] += y[r] * weight[at++];
  return x;
}
// The product of two vectors, or of their channels first ... first + count - 1
function dot(a, b, first = 0, count = a.length) {
  let sum = 0;
  for (let n = first; n < first + count; n++) sum += a[n] * b[n];
  return sum;
}
// a += scale * b, in all channels or in those
function add(a, b, scale = 1, first = 0, count = a.length) {
  for (let n = first; n < first + count; n++) a[n] += scale * b[n];
}
const zeros = count => new Float64Array(count);
const times = (a, b) => a.map((x, n) => x * b[n]);
const total = list => list.reduce((sum, x) => sum + x, 0);
const largest = list => list.reduce((most, x) => Math.max(most, Math.abs(x)), 1e-30);
const cosineOf = (a, b) => dot(a, b) / Math.sqrt(dot(a, a) * dot(b, b) || 1);
// The places of the largest numbers, the largest first
function largestOf(list, count = list.length) {
  const least = new Float64Array(list).sort().at(-Math.min(count, list.length));
  return [...list.keys()].filter(n => list[n] >= least)
    .sort((a, b) => list[b] - list[a] || a - b).slice(0, count);
}
function softmax(scores) {
  const most = scores.reduce((a, b) => Math.max(a, b), -Infinity);
  const powers = Float64Array.from(scores, x => Math.exp(x - most)), sum = total(powers);
  return powers.map(x => x / sum);
}
function centred(x) {
  const mean = total(x) / x.length;
  return x.map(a => a - mean);
}
// 1 / sqrt(variance), by which a LayerNorm multiplies x
const scaleOf = x => 1 / Math.sqrt(dot(centred(x), centred(x)) / x.length + 1e-5);
const layerNorm = ({ weight, bias }, x, scale = scaleOf(x)) =>
  centred(x).map((a, n) => a * scale * weight[n] + (bias ? bias[n] : 0));
// The way back through a LayerNorm whose scale is held
const normBack = ({ weight }, y, scale) => centred(times(y, weight)).map(a => a * scale);
// The error function, by a series whose terms are all of one sign
function erf(x) {
  if (Math.abs(x) > 6) return Math.sign(x);
  let term = x, sum = x;
  for (let n = 1; Math.abs(term) > 1e-17 * Math.abs(sum); n++)
    sum += term *= 2 * x * x / (2 * n + 1);
  return 2 / Math.sqrt(Math.PI) * Math.exp(-x * x) * sum;
}

// ---- the model: what model.py computes, one token at a time ------------------------------------

// The numbers of a model, in 16 bits each: a sign, 5 bits of exponent, 10 of fraction
function unpack(base64) {
  const bytes = Uint8Array.from(atob(base64), letter => letter.charCodeAt(0));
  const numbers = Float32Array.from({ length: 65536 }, (_, n) => (n >> 15 ? -1 : 1)
    * (n & 0x7c00 ? (1 + (n & 1023) / 1024) * 2 ** ((n >> 10 & 31) - 15) : (n & 1023) * 2 ** -24));
  return Float32Array.from(new Uint16Array(bytes.buffer), n => numbers[n]);
}

class Model {
  // The parameters have the names that they have in Python: this.transformer.h[0].attn.c_q.weight.
  // `unseen` is a text that it was not trained on, and `passage` the start of it.
  constructor({ name, config, dataset, parameters, numbers, passage, unseen, vocab = pageVocab }) {
    const all = typeof numbers === "string" ? unpack(numbers) : numbers;
    let at = 0;
    for (const [path, count] of parameters) {
      const keys = path.split("."), last = keys.pop();
      keys.reduce((node, key) => node[key] ??= {}, this)[last] = all.subarray(at, at += count);
    }
    Object.assign(this, { name, config, dataset, vocab, parameters, numbers: all, count: at,
                          passage, unseen });
    this.blocks = Object.values(this.transformer.h);
    // The head, without rows that are no token
    this.head = { weight: this.transformer.wte.weight.subarray(0, vocab.size * config.n_embd) };
    this.isDVA = config.block === "dva";
    this.heads = this.isDVA ? 1 : config.n_head;
  }

  // What was read, and what the explanation holds fixed: each list has one entry for a position.
  // `away` names what is taken away for a trial: {gate: true, layer: 3}.
  memory(away = {}) {
    const layers = this.blocks.map(() =>
      ({ away, scale: [], k: [], u: [], s: [], gate: [], scale2: [], mlpGate: [] }));
    return { away, layers, ids: [], stream: [] };
  }

  // Read one more token
  read({ away, layers, ids, stream }, token) {
    const { wte, wpe } = this.transformer, t = ids.length, x = this.rowOf(wte, token);
    if (wpe) add(x, this.rowOf(wpe, t));
    this.blocks.forEach((block, l) => {
      if (away.layer === l) return;
      add(x, this.attend(block, layers[l], x, t, token));
      if (block.mlp && !away.mlp) add(x, this.think(block, layers[l], x));
    });
    ids.push(token);
    stream.push(x);
  }

  // y_i = W_o [ gate_i * sum_j s_ij u_j ]: DVA's gate is w * g_i / rms_i, and GPT-2's is 1
  attend({ ln_1, attn }, held, x, t, token) {
    const { away } = held, scale = scaleOf(x), n = layerNorm(ln_1, x, scale);
    let [q, k, u, g] = [attn.c_q, attn.c_k, attn.c_v, attn.c_gate].map(W => W && linear(W, n));
    if (attn.bank) u = this.bankRow(attn.bank, token);
    if (this.config.rotary && !away.rotary) for (const x of [q, k]) this.rotate(x, t);
    held.k.push(k);
    held.u.push(u);

    // s_ij = softmax over j <= i of q_i . k_j / sqrt(D), in each head
    const D = q.length / this.heads, width = u.length / this.heads, mixed = zeros(u.length), s = [];
    for (let h = 0; h < this.heads; h++) {
      s.push(softmax(held.k.map(k => dot(q, k, h * D, D) / Math.sqrt(D))));
      held.u.forEach((u, j) => add(mixed, u, s[h][j], h * width, width));
    }
    // v_ij = g_i * u_j, and the norm divides by the size of what was mixed
    let gate = zeros(u.length).fill(1);
    if (this.isDVA && !away.gate) gate = g;
    if (attn.norm && !away.norm) {
      const rms = Math.sqrt(dot(mixed, mixed) / mixed.length + 1e-5);
      gate = gate.map((g, m) => attn.norm.weight[m] * g / rms);
    }
    held.scale.push(scale);
    held.s.push(s);
    held.gate.push(gate);
    return linear(attn.c_proj, times(mixed, gate));
  }

  // GPT-2's MLP, where gelu(z) = gate(z) * z
  think({ ln_2, mlp }, held, x) {
    const scale = scaleOf(x), z = linear(mlp.c_fc, layerNorm(ln_2, x, scale));
    const bend = this.config.gelu === "exact" ? z => erf(z / Math.SQRT2)
      : z => Math.tanh(Math.sqrt(2 / Math.PI) * (z + 0.044715 * z ** 3));
    const gate = z.map(z => (1 + bend(z)) / 2);
    held.scale2.push(scale);
    held.mlpGate.push(gate);
    return linear(mlp.c_proj, times(z, gate));
  }

  // Rotary positions: each pair of channels (c, c + D/2) is rotated by an angle of its own
  rotate(x, t) {
    const D = x.length / this.heads, half = D / 2;
    for (let first = 0; first < x.length; first += D)
      for (let c = 0; c < half; c++) {
        const angle = t * 10000 ** (-c / half), a = x[first + c], b = x[first + c + half];
        x[first + c] = a * Math.cos(angle) - b * Math.sin(angle);
        x[first + c + half] = b * Math.cos(angle) + a * Math.sin(angle);
      }
  }

  rowOf({ weight }, n, C = this.config.n_embd) {
    return Float64Array.from(weight.subarray(n * C, (n + 1) * C));
  }
  bankRow({ table, gamma }, token, M = table.length / this.config.vocab_size) {
    return Float64Array.from(table.subarray(token * M, (token + 1) * M), e => gamma[0] * e);
  }
  // The logits of position i: the head and the final norm read the stream
  logits({ stream }, i) {
    return linear(this.head, layerNorm(this.transformer.ln_f, stream[i]));
  }

  // ---- contributions: one backward pass through the network with weights, gates, scales held

  // The product of position i's output with a row of the head, or the difference of two, is the sum
  // of the parts of all tokens, positions and biases. G[p]: how it changes with the stream at p.
  async parts({ away, layers, ids, stream }, i, head, job) {
    const { wte, wpe, ln_f } = this.transformer, parts = zeros(i + 1), G = Array(i + 1).fill(null);
    let positions = 0, biases = 0;
    const biasOf = (W, y) => { if (W.bias) biases += dot(y, W.bias); };
    const pass = (p, y) => { if (G[p]) add(G[p], y); else G[p] = y; };
    biasOf(ln_f, head);
    pass(i, normBack(ln_f, head, scaleOf(stream[i])));
    for (let l = this.blocks.length - 1; l >= 0; l--) {
      if (away.layer === l) continue;
      const { ln_1, attn, ln_2, mlp } = this.blocks[l], held = layers[l];
      const toU = held.u.slice(0, i + 1).map(u => zeros(u.length));
      for (let p = i; p >= 0 && G[p]; p--) {
        if (mlp && !away.mlp) {
          const toZ = times(back(mlp.c_proj, G[p]), held.mlpGate[p]), toN = back(mlp.c_fc, toZ);
          biasOf(mlp.c_proj, G[p]);
          biasOf(mlp.c_fc, toZ);
          biasOf(ln_2, toN);
          pass(p, normBack(ln_2, toN, held.scale2[p]));
        }
        const toMixed = times(back(attn.c_proj, G[p]), held.gate[p]);
        const width = toMixed.length / this.heads;
        biasOf(attn.c_proj, G[p]);
        held.s[p].forEach((s, h) =>
          s.forEach((weight, j) => add(toU[j], toMixed, weight, h * width, width)));
        await breathe(job);
      }
      if (attn.bank) toU.forEach((y, j) => { parts[j] += dot(y, held.u[j]); });
      else for (let j = 0; j <= i; j++) {
        const toN = back(attn.c_v, toU[j]);
        biasOf(attn.c_v, toU[j]);
        biasOf(ln_1, toN);
        pass(j, normBack(ln_1, toN, held.scale[j]));
        await breathe(job);
      }
    }
    G.forEach((toX, j) => {
      if (!toX) return;
      parts[j] += dot(toX, this.rowOf(wte, ids[j]));
      if (wpe) positions += dot(toX, this.rowOf(wpe, j));
    });
    return { parts, positions, biases };
  }

  // What each layer's look from i at each j contributed directly, as the final norm and the head
  // read it
  looks({ away, layers, stream }, i, head) {
    const readout = normBack(this.transformer.ln_f, head, scaleOf(stream[i]));
    return this.blocks.map(({ attn }, l) => {
      if (away.layer === l) return zeros(i + 1);
      const { s, gate, u } = layers[l], read = times(back(attn.c_proj, readout), gate[i]);
      const width = read.length / this.heads;
      return zeros(i + 1).map((_, j) =>
        total(s[i].map((s, h) => s[j] * dot(read, u[j], h * width, width))));
    });
  }
}
// Let the memory hold these ids: where it has read the same already, that stays
async function remember(model, memory, ids, job) {
  let same = 0;
  while (same < ids.length && memory.ids[same] === ids[same]) same++;
  for (const { away, layers, ...lists } of [memory, ...memory.layers])
    for (const list of Object.values(lists)) list.length = Math.min(list.length, same);
  for (const id of ids.slice(same)) {
    model.read(memory, id);
    await breathe(job);
  }
}

// The next ids, one after another, as sample.py samples them. A full window cannot slide, since its
// positions are fixed: its newer half becomes the beginning of the next one.
async function* writeOn(model, memory, ids, temperature, random, job) {
  const size = model.config.block_size;
  let window = ids.slice(-size);
  for (;;) {
    if (window.length > size) window = window.slice(-Math.max(1, size >> 1));
    await remember(model, memory, window, job);
    const logits = model.logits(memory, window.length - 1), likely = largestOf(logits, 200);
    const probs = softmax(likely.map(id => logits[id] / Math.max(temperature, 1e-5)));
    let u = random();
    const id = likely.find((_, n) => (u -= probs[n]) < 0) ?? likely[0];
    window.push(id);
    yield id;
  }
}
// ---- text <-> tokens ---------------------------------------------------------------------------

// tokens[id] is a character, or a token's bytes, written as characters below 256
function vocabOf({ tokens, kind, size }) {
  const isBytePair = kind !== "char", spelling = [...tokens, "<|endoftext|>"];
  return { tokens, kind, size, isBytePair, spelling, endOfText: isBytePair ? size - 1 : -1,
           idOf: new Map(tokens.map((token, id) => [token, id])) };
}
const pageVocab = vocabOf(data);
// That of the model which the panels show
let vocab = pageVocab;
// GPT-2's pattern. JavaScript's \s is not quite the same set of characters.
const WORDS = new RegExp([`'(?:[sdmt]|ll|ve|re)`, ` ?\\p{L}+`, ` ?\\p{N}+`, ` ?[^\\s\\p{L}\\p{N}]+`,
  `\\s+(?![^\\s])`, `\\s`].join("|").replaceAll("\\s", "\\p{White_Space}"), "gu");

// The token ids of a text, -1 for characters that the alphabet lacks: [{id, text}]
function encode(text) {
  if (!vocab.isBytePair)
    return Array.from(text, letter => ({ id: vocab.idOf.get(letter) ?? -1, text: letter }));
  if (text === vocab.spelling[vocab.endOfText]) return pieces([vocab.endOfText]);
  return pieces((text.match(WORDS) ?? []).flatMap(bytePairs));
}
// Join the neighbours whose pair has the lowest rank, until no pair is a token
function bytePairs(word) {
  const parts = Array.from(new TextEncoder().encode(word), byte => String.fromCharCode(byte));
  if (vocab.idOf.has(parts.join(""))) return [vocab.idOf.get(parts.join(""))];
  const rank = n => vocab.idOf.get(parts[n] + parts[n + 1]) ?? Infinity;
  const ranks = parts.slice(1).map((_, n) => rank(n));
  for (;;) {
    const lowest = ranks.reduce((a, b) => Math.min(a, b), Infinity), n = ranks.indexOf(lowest);
    if (lowest === Infinity) return parts.map(part => vocab.idOf.get(part));
    parts.splice(n, 2, parts[n] + parts[n + 1]);
    ranks.splice(n, 1);
    for (const m of [n - 1, n]) if (m in ranks) ranks[m] = rank(m);
  }
}
// [{id, text}] of token ids. Of tokens that make a character together, the last one has it.
function pieces(ids) {
  const decoder = new TextDecoder("utf-8", { ignoreBOM: true });
  return ids.map((id, n) => ({ id, text: vocab.isBytePair ? decoder.decode(bytesOf(id), { stream:
    n < ids.length - 1 }) : vocab.spelling[id] }));
}
const textOf = list => list.map(({ text }) => text).join("");
const idsIn = list => list.filter(({ id }) => id >= 0).map(({ id }) => id);
const bytesOf = id => Uint8Array.from(vocab.spelling[id], byte => byte.charCodeAt(0));
// A token as lists name it: spaces, line ends and bytes of half a character are visible
function label(id) {
  const text = pieces([id])[0].text, visible = { " ": "·", "\n": "↵", "\t": "⇥" };
  if (vocab.isBytePair && text.includes("\ufffd"))
    return Array.from(bytesOf(id), byte => "\\x" + byte.toString(16)).join("");
  const shown = Array.from(text, c => visible[c] ?? (/[\p{C}\p{Z}]/u.test(c)
    ? `[U+${c.codePointAt(0).toString(16)}]` : c)).join("");
  return /^\p{M}/u.test(shown) ? "◌" + shown : shown;        // an accent stands on a circle
}

// ---- work in slices of 12 ms, so that the page never freezes. New work in a lane ends the old.

let lanes = {}, sliceEnds = 0;
async function work(lane, task) {
  if (lanes[lane]) lanes[lane].over = true;
  const job = lanes[lane] = { over: false };
  $("main").ariaBusy = true;
  if (lane === "text") setWriting(false);
  await task(job).catch(error => { if (error !== job) throw error; });
  if (job.over) return;
  delete lanes[lane];
  $("main").ariaBusy = Object.keys(lanes).length > 0;
}
async function breathe(job) {
  if (performance.now() > sliceEnds) {
    await new Promise(resolve => setTimeout(resolve));
    sliceEnds = performance.now() + 12;
  }
  if (job.over) throw job;
}

// ---- small pieces of the page. All text goes through textContent, so it can only be text.

const signed = (x, digits = 3) => (x < 0 ? "−" : "+") + Math.abs(x).toFixed(digits);
function element(kind, className, ...children) {
  const made = Object.assign(document.createElement(kind), { className });
  made.append(...children);
  return made;
}
const fill = (select, options, value) => select.replaceChildren(...options.map(([text, own]) =>
  new Option(text, own, false, String(own) === String(value))));
function tabulate(table, lines) {
  table.replaceChildren(...lines.map(cells =>
    element("tr", "", ...cells.map((text, n) => element(n ? "td" : "th", "", text)))));
}
// Blue for more than zero, orange for less, and the stronger the larger
const colour = (x, most) => x ? `rgb(var(${x < 0 ? "--minus" : "--plus"}) / `
  + `${(0.85 * Math.min(1, Math.abs(x) / most)).toFixed(3)})` : "";
function cell(kind, className, colour, ...children) {
  const made = element(kind, className, ...children);
  made.style.background = colour;
  return made;
}
// A line of a list: something before a name, the name, a bar, and a figure
function row(kind, first, name, x, most, figure) {
  const bar = cell("span", "bar", colour(x, Math.abs(x)));
  bar.style.width = `${100 * Math.abs(x) / most}%`;
  return element(kind, "", first, name, element("span", "", bar), element("b", "", figure));
}
// Rows of coloured cells: [[name, numbers]]
function paint(map, rows) {
  const most = Math.max(...rows.map(([, numbers]) => largest(numbers)));
  map.replaceChildren(...rows.map(([name, numbers]) => element("div", "",
    element("span", "name", name), ...Array.from(numbers, x => cell("i", "", colour(x, most))))));
}
// The coloured copy under a text to type into: [{text, kind, colour}]. Each of its paragraphs is a
// block, since browsers would mirror brackets in a second one by the direction of the first. A
// paragraph that has not changed stays, so that a long text costs no more than a short one.
function paintText(field, spans) {
  const lines = [[]], copy = field.previousElementSibling;
  for (const { text, kind = "", colour = "" } of spans)
    text.split("\n").forEach((part, n, { length }) => {
      if (n > 0) lines.push([]);
      lines.at(-1).push([n < length - 1 ? `${kind} line` : kind, colour, part]);
    });
  lines.forEach((line, n) => {
    const key = JSON.stringify(line), old = copy.children[n];
    if (old?.key === key) return;
    const made = element("div", "", ...line.map(span => cell("span", ...span)));
    made.key = key;
    if (old) old.replaceWith(made);
    else copy.append(made);
  });
  while (copy.children.length > lines.length) copy.lastChild.remove();
}

// ---- the text, what is expected at the cursor, and what contributed to it ----------------------

// The cursor is after `place` tokens. Those from `first` on are in the window, and what is kept of
// them counts from there. `key` is the token that is read, `written` what models wrote.
const state = { model: null, memory: null, pieces: [], ids: [], place: 0, first: 0,
                parts: [], looks: [], values: [], key: 0, written: [] };
const MOST_TEXT = 20000;
const newest = () => state.place - state.first - 1;
const nameOf = j => `${state.first + +j + 1} ${label(state.memory.ids[j])}`;

// Each piece gets n, the number of tokens before it, and the place in the text where it ends
function setPieces(list) {
  let end = 0, n = 0;
  for (const piece of list) {
    piece.text = piece.text.replaceAll("\r", "");            // as a text field does
    Object.assign(piece, { end: end += piece.text.length, n: piece.id < 0 ? n : n++ });
  }
  // The first tokens of a character end where it does
  for (let m = list.length - 2; m >= 0; m--) if (!list[m].text) list[m].end = list[m + 1].end;
  Object.assign(state, { pieces: list, ids: idsIn(list) });
}
function putText(list, cursor = Infinity) {
  setPieces(list);
  $("text").value = textOf(list);
  const end = list[Math.min(cursor, list.length) - 1]?.end ?? 0;
  $("text").setSelectionRange(end, end);
  placeCursor();
}
// The field itself would take minutes to take in a book
function pasted(event) {
  const field = $("text"), { selectionStart: from, selectionEnd: to, value } = field;
  const given = event.clipboardData.getData("text"), room = MOST_TEXT - value.length + to - from;
  if (given.length < room) return;
  event.preventDefault();
  field.setRangeText(given.slice(0, room), from, to, "end");
  typed();
}
function typed() {
  game.answer = null;
  setPieces(encode($("text").value));
  look();
}
function placeOfCursor() {
  const at = $("text").selectionStart;
  return state.pieces.filter(({ id, end }) => id >= 0 && end <= at).length;
}
function placeCursor() {
  state.place = placeOfCursor();
  state.first = Math.max(0, state.place - state.model.config.block_size);
}
function paintPieces(parts) {
  const { first, place, key, pieces, model } = state, end = first + model.config.block_size;
  const far = test => ({ kind: "far", text: textOf(pieces.filter(test)) }), most = largest(parts);
  const kindOf = (id, n) => id < 0 ? "unknown" : n === place ? "later here" : n > place ? "later"
    : n === first + key && parts.length ? "key" : "";
  paintText($("text"), [far(({ n }) => n < first),
    ...pieces.filter(({ n }) => n >= first && n < end).map(({ id, text, n }) =>
      ({ text, kind: kindOf(id, n), colour: id < 0 ? "" : colour(parts[n - first] ?? 0, most) })),
    far(({ n }) => n >= end), { text: "\u2009", kind: place === state.ids.length ? "here" : "" }]);
}
// What a text has that the model does not know, as a sentence
function unknownIn(list) {
  const lacks = new Set(list.filter(({ id }) => id < 0).map(({ text }) => text));
  return lacks.size ? `The model was trained on ${vocab.size} characters. It does not know “${
    [...lacks].slice(0, 9).join("")}”, so it leaves that out. ` : "";
}

// Shows all that follows from the text and the cursor. It explains the logit of the token `target`:
// without it, of the token after the cursor, and at the end of the text of the likeliest one. With
// `other` it explains by how much the logit of `target` is above that of `other`.
const look = (target, other = "") => work("text", async job => {
  placeCursor();
  paintPieces(target === undefined ? [] : state.parts);
  const { model, memory, ids, pieces, place, first } = state, size = model.config.block_size;
  $("remark").textContent = unknownIn(pieces)
    + ($("text").value.length < MOST_TEXT ? "" : `The text is cut: it holds ${
        MOST_TEXT.toLocaleString("en")} characters. `)
    + (first ? `Its window is full: it sees the newest ${size} tokens before the cursor.` : "");
  await remember(model, memory, ids.slice(first, first + size), job);

  $("expected").hidden = place === 0;
  $("answers").classList.toggle("empty", place === 0 || game.answer !== null);
  $("question").textContent = pieces[0]?.end <= $("text").selectionStart
    ? "The model knows none of the characters before the cursor."
    : "Nothing is before the cursor: move it, or type.";
  if (place === 0) return;
  const probs = softmax(model.logits(memory, newest()));
  const came = ids[place], likely = largestOf(probs, 10), [best] = likely;
  if (game.answer !== null) return showGuesses(likely);
  $("question").textContent = place === ids.length ? `It expects “${label(best)}” next.`
    : `It expected “${label(best)}” here, and “${label(came)}” came.`;
  target ??= came ?? best;
  for (const id of [came, target])
    if (id !== undefined && !likely.includes(id)) likely.push(id);
  const hadFocus = $("expected").contains(document.activeElement);
  $("expected").replaceChildren(...likely.map(id => {
    const radio = Object.assign(element("input"), { type: "radio", name: "target",
      checked: id === target, value: id, onchange: () => look(id) });
    return row("label", radio, element("bdi", "", label(id)), probs[id], probs[best],
               `${(100 * probs[id]).toFixed(probs[id] < 0.001 ? 3 : 1)} %`);
  }));
  if (hadFocus) $("expected").querySelector(":checked").focus();
  fill($("against"), [["nothing: its logit", ""], ...likely.map(id => [label(id), id])], other);
  await explain(target, other, job);
});

async function explain(target, other, job) {
  const { model, memory } = state, { wte, ln_f } = model.transformer, i = newest();
  const head = model.rowOf(wte, target);
  if (other) add(head, model.rowOf(wte, +other), -1);
  const { parts, positions, biases } = await model.parts(memory, i, head, job);
  const logit = dot(head, layerNorm(ln_f, memory.stream[i]));
  const sum = total(parts) + positions + biases;
  Object.assign(state, { parts, looks: model.looks(memory, i, head) });
  $("wanted").textContent = label(target);

  const list = Array.from(parts, (x, j) => [x, element("bdi", "", label(memory.ids[j])), j]);
  if (positions) list.push([positions, "all positions"]);
  if (biases) list.push([biases, "all biases"]);
  list.sort(([a], [b]) => Math.abs(b) - Math.abs(a));
  $("givers").replaceChildren(...list.map(([x, name, j]) => {
    const number = element("small", "", j >= 0 ? state.first + j + 1 : "");
    const button = row("button", number, name, x, Math.abs(list[0][0]), signed(x));
    button.onclick = () => lanes.text || chooseKey(j);
    Object.assign(button, { disabled: !(j >= 0), value: j });
    return element("li", "", button);
  }));
  tabulate($("sum"), [["sum of the parts", signed(sum, 6)],
    [other ? "difference of the two logits" : "the model's logit", signed(logit, 6)],
    ["difference", (sum - logit).toExponential(1).replaceAll("-", "−")]]);
  fill($("key"), Array.from(parts, (_, j) => [nameOf(j), j]), 0);
  // The largest contribution of a token that another one has read, too
  chooseKey(list.find(([, , j]) => j < i)?.[2] ?? i);
}

// ---- the guessing game: what comes next in a text that the model has not seen? -----------------

const game = { answer: null, tries: 0, yours: 0, models: 0 };
// Show the text up to a random place. The probabilities are hidden until somebody has guessed.
function nextGuess() {
  const list = encode(data.unseen).filter(({ id }) => id >= 0);
  const least = Math.min(20, list.length - 1);
  const place = least + Math.floor(Math.random() * (list.length - least));
  game.answer = list[place].id;
  putText(list.slice(Math.max(0, place - 100), place));
  look();
}
function showGuesses(likely) {
  const [best] = likely, choices = [...new Set([...likely.slice(0, 7), game.answer])];
  $("question").textContent = "What comes next? Guess.";
  $("expected").replaceChildren(...choices.sort((a, b) => a - b).map(id => {
    const radio = Object.assign(element("input"), { type: "radio", name: "target", onchange() {
      const { answer } = game;
      game.answer = null;
      game.tries++;
      game.yours += id === answer;
      game.models += best === answer;
      const verdict = id === answer ? "right" : "not your guess";
      $("score").textContent = `“${label(answer)}” came: ${verdict}. Score: you ${game.yours}, the `
        + `model ${game.models}, of ${game.tries}.`;
      look(answer);
    } });
    return element("label", "", radio, element("bdi", "", label(id)));
  }));
}

// ---- attention, the pair's own value, the bank's rows -----------------------------------------

// The attention weights of a layer at the cursor, a row for each head
const attentionOf = layer => state.memory.layers[layer].s[newest()] ?? [zeros(newest() + 1)];
function chooseKey(key) {
  const { looks, memory, parts } = state, shown = Math.max(0, parts.length - 32);
  const names = memory.ids.slice(shown, parts.length).map(label);
  state.key = $("key").value = key;
  $("shown").textContent = shown ? `the newest 32 of ${parts.length}` : `all ${parts.length}`;
  paintPieces(parts);
  for (const button of $("givers").querySelectorAll("button"))
    button.classList.toggle("key", button.value === String(key));
  paint($("weights"), looks.flatMap((_, layer) => attentionOf(layer).map((s, head) =>
    [head ? "" : `layer ${layer + 1}`, s.slice(shown)])));
  paint($("looks"), looks.map((row, layer) => [`layer ${layer + 1}`, row.slice(shown)]));
  $("looks").append(element("div", "", element("span", "name"), ...names.map((name, n) =>
    element("span", shown + n === key ? "token key" : "token", name))));
  $("looks").style.setProperty("--way", names.every(name => name.length < 2) ? "upright" : "mixed");
  tabulate($("key-table"), [["layer", "weight", "contributed"], ...looks.map((row, layer) => [
    layer + 1, attentionOf(layer).map(s => s[key].toFixed(2)).join(" "), signed(row[key])])]);
  // The layer in which this token mattered most
  const there = Object.keys(looks).filter(layer => +layer !== memory.away.layer);
  const [best] = largestOf(there.map(layer => Math.abs(looks[layer][key])), 1);
  fill($("layer"), there.map(layer => [+layer + 1, layer]), there[best]);
  chooseLayer();
  showBanks();
}

function chooseLayer() {
  const { key, memory } = state, i = newest(), { gate, u } = memory.layers[$("layer").value];
  // v_ij = gate_i * u_j for all readers i. The one who differs most from the newest is shown first.
  const values = state.values = gate.map(g => times(g, u[key]));
  const cosines = values.map((v, n) => n < key || n === i ? 2 : cosineOf(v, values[i]));
  const readers = largestOf(cosines.map(x => -x)).filter(n => cosines[n] < 2);
  fill($("other"), readers.map(n => [`${nameOf(n)}: ${cosines[n].toFixed(2)}`, n]), readers[0]);
  showPair();
}
function showPair() {
  const { key, memory, model, values } = state, i = newest(), other = $("other").value;
  const strips = [[`u of ${nameOf(key)}`, memory.layers[$("layer").value].u[key]],
                  ...[i, other].filter(n => n !== "").map(n => [`v for ${nameOf(n)}`, values[n]])];
  paint($("strips"), strips.map(([name, x]) => [name, x.map(a => a / largest(x))]));
  $("cosine").textContent = !other ? "No other token has read this one."
    : `Cosine of the two values: ${cosineOf(values[i], values[other]).toFixed(2)}.`;
  $("meaning").textContent = !other ? "" : !model.isDVA ? "They are the same." : "1 says that both "
    + "take the same, 0 that what they take has nothing in common, and below 0 one adds what the "
    + "other takes away.";
}

function showBanks() {
  const { model, memory, key } = state, { ln_f } = model.transformer, token = memory.ids[key];
  const line = (name, ids, figure) => element("p", "", name, ...ids.flatMap(id =>
    [" ", element("bdi", "", label(id)), element("small", "", figure(id))]));
  const found = model.blocks.flatMap(({ attn }, l) => {
    if (!attn.bank || memory.away.layer === l) return [];
    const { s, gate } = memory.layers[l], row = model.bankRow(attn.bank, token);
    const cosines = zeros(vocab.size).map((_, id) =>
      id === token ? -2 : cosineOf(row, model.bankRow(attn.bank, id)));
    // How much of each channel all positions together took, each through its own heads and gate
    const gates = zeros(row.length), width = row.length / model.heads;
    s.forEach((heads, i) => memory.ids.slice(0, i + 1).forEach((id, j) => {
      if (id === token) heads.forEach((s, h) => add(gates, gate[i], s[j], h * width, width));
    }));
    // W_o, then the final norm but for its scale, then the head
    const wrote = linear({ weight: attn.c_proj.weight }, times(gates, row));
    const raised = linear(model.head, layerNorm({ weight: ln_f.weight }, wrote, 1));
    return [element("h3", "", `Layer ${l + 1}, token ${nameOf(key)}`),
            line("rows like it:", largestOf(cosines, Math.min(8, vocab.size - 1)),
                 id => ` ${cosines[id].toFixed(2)}`),
            line("it raised:", largestOf(raised, 8), () => "")];
  });
  $("bank-rows").replaceChildren(...found);
  $("banks").hidden = !found.length;
}

// ---- put it to the test: another text, another run, and pieces of the model taken away ---------

const nameAway = away => Object.keys(away).map(piece => piece === "layer"
  ? `layer ${away.layer + 1}` : $(piece).parentElement.textContent.trim()).join(" and ");

const test = () => work("test", async job => {
  const { model, memory: { away } } = state, runs = [{ model, away: {}, name: model.name }];
  if (nameAway(away)) runs.push({ model, away, name: `${model.name} without ${nameAway(away)}` });
  for (const other of models)
    if (other !== model && other.vocab === vocab)
      runs.push({ model: other, away: {}, name: other.name });
  const text = $("passage").value, list = encode(text);
  const size = Math.min(...runs.map(({ model }) => model.config.block_size));
  const ids = idsIn(list).slice(0, size), count = ids.length - 1;
  const writers = new Set(state.written.filter(w => text.includes(w.start)).map(w => w.by));
  // A model of whose validation split this text is, if there is one
  const source = [model, ...models].find(({ passage }) => passage === text);
  $("origin").textContent = (!text ? "Type or paste a text." : source
    ? `This is from the validation split of ${source.dataset}${
        source === model ? ", which it was not trained on" : ""}.`
    : writers.size ? `${[...writers].join(" and ")} wrote a part of this text, which favours it.`
    : "This is a text of yours.") + (count < idsIn(list).length - 1
      ? ` Its first ${size} tokens count.` : "") + ` ${unknownIn(list)}`.trimEnd();
  paintText($("passage"), list);
  for (const run of runs) {
    const memory = run.model.memory(run.away), ending = [];
    await remember(run.model, memory, ids, job);
    run.nats = ids.slice(1).map((id, i) => -Math.log(softmax(run.model.logits(memory, i))[id]));
    const next = writeOn(run.model, memory, ids, 0, () => 0, job);
    while (ids.length && ending.length < 60) ending.push((await next.next()).value);
    run.ending = textOf(pieces(ending)).replaceAll("\n", "↵");
  }
  // With another run the colours say which of the two expected a token better
  const [first, second] = runs, better = first.nats.map((x, n) => second ? second.nats[n] - x : -x);
  const most = second ? Math.max(0.1, Math.min(3, largest(better))) : Math.log(vocab.size);
  let n = -2;
  paintText($("passage"), list.map(({ id, text }) => ({ text, kind: id < 0 ? "unknown" : "",
    colour: colour(id < 0 ? 0 : better[++n] ?? 0, most) })));
  $("better").style.setProperty("--end", second ? "" : "transparent");
  $("better").replaceChildren(second ? `better: ${second.name}` : "a surprise", element("i", ""),
                              second ? first.name : "expected");
  tabulate($("losses"), [["", "loss a token", "in all"], ...runs.map(({ name, nats }) =>
    [name, ...(count > 0 ? [(total(nats) / count).toFixed(3), total(nats).toFixed(2)] : [])])]);
  $("endings").replaceChildren(...runs.filter(({ ending }) => ending).map(({ name, ending }) =>
    element("p", "", `${name}, always the likeliest token, goes on: “${ending}”`)));
});

// What the switches say is away, for all panels
function takeAway() {
  const chosen = [...new FormData($("switches"))].filter(([, value]) => value !== "");
  const away = Object.fromEntries(chosen.map(([piece, value]) => [piece, +value]));
  state.memory = state.model.memory(away);
  $("changed").textContent = chosen.length ? `All panels are without ${nameAway(away)}.` : "";
  look();
  test();
}

function chooseModel(model) {
  game.answer = null;
  const { name, config, blocks, count, dataset } = state.model = model, text = textOf(state.pieces);
  const isOther = vocab !== model.vocab;
  vocab = model.vocab;
  $("model").textContent = `${name}: ${config.n_layer} ${config.block} layers, ${
    count.toLocaleString("en")} parameters${dataset && `, trained on ${dataset}`}. It reads and `
    + `writes ${vocab.isBytePair ? "pieces of words" : "characters"}, here in your browser.`;
  for (const kind of ["dva", "gpt2"])
    for (const other of document.querySelectorAll(`.${kind}`)) other.hidden = kind !== config.block;
  fill($("without"), [["no layer", ""], ...blocks.map((_, l) => [`layer ${l + 1}`, l])], "");
  $("switches").reset();
  $("without").hidden = blocks.length === 1;
  const [{ attn, mlp }] = blocks;
  const there = { gate: attn.c_gate, norm: attn.norm, mlp, rotary: config.rotary };
  for (const id of Object.keys(there)) $(id).parentElement.hidden = !there[id];
  if (isOther) putText(encode(text));
  takeAway();
}
// A model joins those that the panels can show, or takes the place of one of the same name
function addModel(model) {
  const n = models.findIndex(({ name }) => name === model.name);
  models.splice(n < 0 ? models.length : n, 1, model);
  fill($("chosen"), models.map(({ name }, n) => [name, n]), models.indexOf(model));
  $("chosen").parentElement.hidden = models.length < 2;
  chooseModel(model);
}

// ---- put it together ---------------------------------------------------------------------------

// While the model writes, what the panels say is of earlier
function setWriting(writes) {
  const [off, on] = (writes ? ["go", "stop"] : ["stop", "go"]).map($);
  on.disabled = false;
  if (document.activeElement === off) on.focus();
  off.disabled = true;
  $("expected").inert = $("answers").inert = writes;
}
// Write up to `count` tokens after the cursor
const proceed = count => work("text", async job => {
  placeCursor();
  const { model, memory, place } = state, cursor = state.pieces.findIndex(({ n }) => n >= place);
  const before = cursor < 0 || place === state.ids.length ? [...state.pieces]
    : state.pieces.slice(0, cursor);
  const after = state.pieces.slice(before.length), random = randomOf(+$("seed").value);
  const next = writeOn(model, memory, idsIn(before), +$("temperature").value, random, job);
  const written = { by: model.name, start: "" }, added = [];
  before.splice(0, before.length + after.length + count - MOST_TEXT);
  game.answer = null;
  setWriting(true);
  while (place && added.length < count) {
    if (added.push((await next.next()).value) === 1) state.written.push(written);
    putText([...before, ...pieces(added), ...after], before.length + added.length);
    written.start = textOf(state.pieces.slice(before.length, before.length + 20));
    paintPieces([]);
    if (!after.length) $("text").parentElement.scrollTop = $("text").scrollHeight;
    // A pace at which one can see it write
    await new Promise(resolve => setTimeout(resolve, 12));
    await breathe(job);
  }
  look();
});

// A block that the page does not know: it shows what Python has computed for one text
function showRecorded({ block, ids, likely, weights }) {
  $("main").classList.add("recorded");
  $("model").textContent = `This page does not know the block “${block}”. It shows what Python `
    + "computed for this text; run tools.explain again for another one.";
  Object.assign(state, { model: { config: { block_size: ids.length } }, key: -1 });
  $("text").readOnly = true;
  putText(pieces(ids));
  const names = ids.slice(-32).map(label), choose = ({ id, logit, parts }) => {
    const order = largestOf(parts.map(Math.abs)), sum = total(parts);
    paintPieces(parts);
    $("wanted").textContent = label(id);
    $("givers").replaceChildren(...order.map(j => row("li", element("small", "", j + 1),
      element("bdi", "", label(ids[j])), parts[j], Math.abs(parts[order[0]]), signed(parts[j]))));
    tabulate($("sum"), [["sum of the parts", signed(sum, 6)],
      ["the model's logit", signed(logit, 6)], ["not in the parts", signed(logit - sum, 6)]]);
  };
  $("question").textContent = `It expects “${label(likely[0].id)}” next.`;
  $("expected").replaceChildren(...likely.map((token, n) => {
    const radio = Object.assign(element("input"), { type: "radio", name: "target", checked: n === 0,
      onchange: () => choose(token) });
    return row("label", radio, element("bdi", "", label(token.id)), token.prob, likely[0].prob,
               `${(100 * token.prob).toFixed(1)} %`);
  }));
  $("shown").textContent = `the newest ${names.length} of ${ids.length}`;
  $("weights").closest("section").hidden = !weights.length;
  paint($("weights"), weights.flatMap((heads, layer) => heads.map((s, head) =>
    [head ? "" : `layer ${layer + 1}`, s.slice(-32)])));
  $("weights").append(element("div", "", element("span", "name"),
                              ...names.map(name => element("span", "token", name))));
  choose(likely[0]);
  $("main").hidden = false;
}

// The page computes what model.py does, for a whole window, or it does not open
const start = () => work("check", async job => {
  $("foot").value = data.foot;
  if (data.recorded) return showRecorded(data.recorded);
  models.push(...data.models.map(stored => new Model(stored)));
  for (const [n, model] of models.entries()) {
    const memory = model.memory(), { ids, logits } = data.models[n].check;
    await remember(model, memory, ids, job);
    const found = model.logits(memory, ids.length - 1);
    if (!(largest(logits.map((x, id) => x - found[id])) <= 1e-3 * largest(logits)))
      throw Error(`model.py computes ${model.name}'s ${model.config.block} blocks in another way `
        + `than this page: what you changed there, change in class Model of tools/read.js`);
  }
  for (const id of ["temperature", "seed", "passage"]) $(id).value = data[id];
  $("main").hidden = false;
  $("warmth").value = data.temperature;
  $("play").hidden = !data.unseen;
  [state.model] = models;
  putText(encode(data.start.slice(-MOST_TEXT)));
  document.addEventListener("selectionchange", () => {
    if (document.activeElement !== $("text") || placeOfCursor() === state.place) return;
    game.answer = null;
    look();
  });
  for (const model of models) addModel(model);
  chooseModel(models[0]);
  $("chosen").value = 0;
  if (data.write > 0) proceed(data.write);
});
