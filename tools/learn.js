// Learning: a GPT of model.py's blocks, its gradients, and the optimizer of nanodva/optimizers.py,
// for the page that tools/explain.py writes. No libraries. Read it from top to bottom: the kernels,
// the model forward and backward, one step of the optimizer, batches, and the workers that share a
// batch. The page, each worker and a console run this same file.
"use strict";

// ---- kernels -----------------------------------------------------------------------------------

// What tools/kernel.ts computes with WebAssembly, in plain JavaScript, for browsers without it.
// Matrices are row after row; addresses are in bytes, as there, and strides in numbers.
class Plain {
  constructor(memory) { this.heap = new Float32Array(memory.buffer); }

  // C (M, N) = A B, or C + A B. Element (m, k) of A is at m * ar + k * ac, so A may be transposed.
  multiply(A, ar, ac, B, br, C, cr, M, N, K, keep) {
    const { heap } = this;
    for (let m = 0; m < M; m++) {
      const row = heap.subarray(C / 4 + m * cr, C / 4 + m * cr + N);
      if (!keep) row.fill(0);
      for (let k = 0; k < K; k++) {
        const a = heap[A / 4 + m * ar + k * ac], b = B / 4 + k * br;
        for (let n = 0; n < N; n++) row[n] += a * heap[b + n];
      }
    }
  }
  // B (N, M) = A^T, A's rows being ar apart
  transpose(A, ar, B, M, N) {
    for (let m = 0; m < M; m++)
      for (let n = 0; n < N; n++) this.heap[B / 4 + n * M + m] = this.heap[A / 4 + m * ar + n];
  }
  // y = (x - mean) * scale * w with scale = 1 / sqrt(variance + 1e-5), which is kept for the way
  // back: a LayerNorm, or with centred = 0, which leaves the mean out, an RMSNorm
  normalize(x, w, y, scale, rows, C, centred) {
    this.rows(rows, C, [x, y], (n, row, out) => {
      const mean = centred * sum(row) / C, weight = this.list(w, C);
      const s = 1 / Math.sqrt(row.reduce((all, a) => all + (a - mean) ** 2, 0) / C + 1e-5);
      for (let c = 0; c < C; c++) out[c] = (row[c] - mean) * s * weight[c];
      this.heap[scale / 4 + n] = s;
    });
  }
  // The way back: dw += dy n, where n = (x - mean) * scale, summed over rows, and
  // dx += scale * (dn - mean(dn) - n * mean(dn n)), where dn = dy w
  normalizeBack(dy, x, w, scale, dx, dw, rows, C, centred) {
    const weight = this.list(w, C), toWeight = this.list(dw, C);
    this.rows(rows, C, [dy, x, dx], (r, d, row, to) => {
      const mean = centred * sum(row) / C, s = this.heap[scale / 4 + r];
      const n = row.map(a => (a - mean) * s), dn = d.map((a, c) => a * weight[c]);
      const a = centred * sum(dn) / C, b = sum(dn.map((a, c) => a * n[c])) / C;
      for (let c = 0; c < C; c++) {
        toWeight[c] += d[c] * n[c];
        to[c] += s * (dn[c] - a - n[c] * b);
      }
    });
  }
  // Each row becomes the softmax of factor * s over its first `seen` numbers, and 0 after them; the
  // next row sees `more` numbers more
  softmax(s, rows, width, seen, more, factor) {
    this.rows(rows, width, [s], (n, row) => {
      const part = row.subarray(0, seen + n * more), most = Math.max(...part);
      part.forEach((x, c) => { part[c] = Math.exp(factor * (x - most)); });
      const all = sum(part);
      row.forEach((x, c) => { row[c] = c < part.length ? x / all : 0; });
    });
  }
  // ds = s * (ds - sum(ds s)) * factor
  softmaxBack(s, ds, rows, width, seen, more, factor) {
    this.rows(rows, width, [s, ds], (n, row, to) => {
      let mean = 0;
      for (let c = 0; c < seen + n * more; c++) mean += row[c] * to[c];
      to.forEach((d, c) => { to[c] = c < seen + n * more ? row[c] * (d - mean) * factor : 0; });
    });
  }
  // y = a x + b y
  blend(a, x, b, y, count) {
    for (let n = 0; n < count; n++)
      this.heap[y / 4 + n] = a * this.heap[x / 4 + n] + b * this.heap[y / 4 + n];
  }
  // y = a b, element by element
  times(a, b, y, count) {
    const first = this.list(a, count), second = this.list(b, count);
    for (let n = 0; n < count; n++) this.heap[y / 4 + n] = first[n] * second[n];
  }
  // Rotate the pairs (c, c + D / 2) of rows that are `skip` apart; row r is at position r mod T.
  // way = -1 rotates them back.
  rotate(x, skip, cos, sin, rows, T, D, way) {
    for (let r = 0; r < rows; r++)
      for (let c = 0; c < D / 2; c++) {
        const at = r % T * D / 2 + c, first = x / 4 + r * skip + c, second = first + D / 2;
        const co = this.heap[cos / 4 + at], si = way * this.heap[sin / 4 + at];
        const a = this.heap[first], b = this.heap[second];
        this.heap[first] = a * co - b * si;
        this.heap[second] = b * co + a * si;
      }
  }
  // y = gelu(z), and dy = dy gelu'(z): with OpenAI's tanh, or with the exact error function
  gelu(z, y, count, exact) {
    for (let n = 0; n < count; n++) {
      const x = this.heap[z / 4 + n];
      this.heap[y / 4 + n] = x * phi(x, exact);
    }
  }
  geluBack(z, dy, count, exact) {
    for (let n = 0; n < count; n++) {
      const x = this.heap[z / 4 + n], p = phi(x, exact);
      const slope = exact ? Math.exp(-x * x / 2) / Math.sqrt(2 * Math.PI)
        : p * (1 - p) * 2 * Math.sqrt(2 / Math.PI) * (1 + 3 * 0.044715 * x * x);
      this.heap[dy / 4 + n] *= p + x * slope;
    }
  }
  list(at, count) { return this.heap.subarray(at / 4, at / 4 + count); }
  rows(count, width, starts, action) {
    for (let n = 0; n < count; n++)
      action(n, ...starts.map(at => this.list(at + 4 * n * width, width)));
  }
}
const sum = list => list.reduce((all, x) => all + x, 0);
function phi(x, exact) {
  if (!exact) return 1 / (1 + Math.exp(-2 * Math.sqrt(2 / Math.PI) * (x + 0.044715 * x ** 3)));
  // Abramowitz and Stegun, 7.1.26: its error is below 2e-7
  const t = 1 / (1 + 0.3275911 * Math.abs(x) / Math.SQRT2);
  const tail = 0.5 * Math.exp(-x * x / 2) * t * (0.254829592 + t * (-0.284496736
    + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))));
  return x < 0 ? tail : 1 - tail;
}

// All tensors are asked for first; open() then makes one memory for them, and returns the kernels
class Room {
  constructor() { Object.assign(this, { size: 1024, tensors: [] }); }
  tensor(rows, width = 1) {
    const made = { at: this.size, rows, width, count: rows * width };
    this.size += Math.ceil(made.count / 4) * 16;
    this.tensors.push(made);
    return made;
  }
  // `modules` are the bytes of the kernels, the fastest first
  open(modules) {
    const code = globalThis.WebAssembly && modules.find(bytes => WebAssembly.validate(bytes));
    const memory = code ? new WebAssembly.Memory({ initial: Math.ceil(this.size / 65536) })
      : { buffer: new ArrayBuffer(this.size) };
    for (const tensor of this.tensors)
      tensor.data = new Float32Array(memory.buffer, tensor.at, tensor.count);
    if (!code) return new Plain(memory);
    return new WebAssembly.Instance(new WebAssembly.Module(code), { env: { memory } }).exports;
  }
}

// ---- the model ---------------------------------------------------------------------------------

const roundUp = (x, to) => Math.ceil(x / to) * to;
// The shape of each parameter, by its name in Python; one of one dimension has rows = 1
function shapesOf({ block, n_layer, n_embd: C, vocab_size: V, block_size, ...config }) {
  const isDVA = block === "dva", D = isDVA ? config.qk_dim : C;
  const M = isDVA ? config.value_dim || C : C;
  const shapes = { "transformer.wte.weight": [V, C] };
  if (config.rotary !== "only") shapes["transformer.wpe.weight"] = [block_size, C];
  for (let l = 0; l < n_layer; l++) {
    const banked = l >= n_layer - config.bank_layers, h = `transformer.h.${l}.`;
    Object.assign(shapes, {
      [h + "ln_1.weight"]: [1, C],
      ...banked && { [h + "attn.bank.table"]: [V, M], [h + "attn.bank.gamma"]: [1, 1] },
      [h + "attn.c_q.weight"]: [D, C], [h + "attn.c_k.weight"]: [D, C],
      ...!banked && { [h + "attn.c_v.weight"]: [M, C] },
      ...isDVA && { [h + "attn.c_gate.weight"]: [M, C] },
      ...isDVA && config.value_norm && { [h + "attn.norm.weight"]: [1, M] },
      [h + "attn.c_proj.weight"]: [C, M],
      ...!isDVA && { [h + "ln_2.weight"]: [1, C], [h + "mlp.c_fc.weight"]: [4 * C, C],
                     [h + "mlp.c_proj.weight"]: [C, 4 * C] } });
  }
  return { ...shapes, "transformer.ln_f.weight": [1, C] };
}

// A model that can learn. It reads up to `windows` windows at once; a longer batch goes in pieces.
class Learner {
  constructor(config, modules, windows = Math.max(1, Math.round(256 / config.block_size))) {
    const room = new Room(), { n_embd: C, block_size: T, n_layer, vocab_size: V } = config;
    Object.assign(this, { config, windows, isDVA: config.block === "dva", step: 0, params: {} });
    this.heads = this.isDVA ? 1 : config.n_head;
    this.D = (this.isDVA ? config.qk_dim : C) / this.heads;
    this.M = this.isDVA ? config.value_dim || C : C;
    const shapes = Object.entries(shapesOf(config));
    // The head's products are 8 tokens wide; rows of the table that are no tokens stay 0
    const rowsOf = (name, rows) => name.endsWith("wte.weight") ? roundUp(rows, 8) : rows;
    for (const part of ["weight", "grad", "mean", "square"]) {
      for (const [name, [rows, width]] of shapes) {
        const tensor = room.tensor(rowsOf(name, rows), width);
        if (part === "weight") this.params[name] = Object.assign(tensor, { name });
        else this.params[name][part] = tensor;
      }
      // The loss and the last step travel with the gradients
      if (part === "grad") this.note = room.tensor(1, 2);
    }
    const N = windows * T, wide = this.isDVA ? Math.max(C, this.M) : 4 * C, V8 = roundUp(V, 8);
    const rows = width => room.tensor(N, width);
    const norms = width => ({ out: rows(width), scale: rows(1) });
    this.layers = Array.from({ length: n_layer }, (_, l) => ({
      x: rows(C), ...this.named(`transformer.h.${l}.`), norm1: norms(C),
      q: rows(this.D * this.heads), k: rows(this.D * this.heads), u: rows(this.M),
      s: room.tensor(windows * this.heads * T, T), mixed: rows(this.M),
      ...this.isDVA ? { g: rows(this.M), norm: norms(this.M), gated: rows(this.M) }
        : { x2: rows(C), norm2: norms(C), z: rows(4 * C), bent: rows(4 * C) } }));
    Object.assign(this, { wte: this.params["transformer.wte.weight"],
      wpe: this.params["transformer.wpe.weight"], ln_f: this.params["transformer.ln_f.weight"],
      stream: rows(C), normF: norms(C), logits: rows(V8),
      // Gradients on the way back; `turned` holds a transposed matrix
      dx: rows(C), dn: rows(C), dq: rows(this.D * this.heads), dk: rows(this.D * this.heads),
      du: rows(this.M), dm: rows(this.M), dz: rows(wide), dr: rows(wide), ds: room.tensor(T, T),
      turned: room.tensor(Math.max(wide, V8, T), Math.max(wide, T)),
      gram: room.tensor(wide, wide), square: room.tensor(wide, wide),
      ahead: room.tensor(wide, wide), cos: room.tensor(T, this.D / 2),
      sin: room.tensor(T, this.D / 2) });
    // Without learned positions the first layer's q, k, u and g follow from the token alone. They
    // are computed once for each token, not for each position, which spares 18 % of CPU time.
    const each = width => room.tensor(V8, width), [{ W, q }] = this.layers;
    if (!this.wpe && V8 <= N)
      this.tokens = { W, x: this.wte, norm1: { out: each(C), scale: each(1) },
        ...Object.fromEntries(["q", "k", "u", "g", "dq", "dk", "du", "dg"].map(name =>
          [name, each(/[qk]$/.test(name) ? q.width : this.M)])) };
    this.kernel = room.open(modules);
    const all = Object.values(this.params), from = all[0], to = all.at(-1);
    const span = (a, b) => new Float32Array(a.data.buffer, a.at, (b.at - a.at) / 4 + b.count);
    Object.assign(this, { weights: span(from, to), grads: span(from.grad, this.note) });
    for (let t = 0; t < T; t++)
      for (let c = 0; c < this.D / 2; c++) {
        const angle = t * 10000 ** (-c / (this.D / 2));
        this.cos.data[t * this.D / 2 + c] = Math.cos(angle);
        this.sin.data[t * this.D / 2 + c] = Math.sin(angle);
      }
  }
  // A layer's parameters by their own names: {c_q, "mlp.c_proj", ...}
  named(prefix) {
    return { W: Object.fromEntries(Object.entries(this.params)
      .filter(([name]) => name.startsWith(prefix))
      .map(([name, p]) => [name.slice(prefix.length).replace(/^attn\.|\.weight$/g, ""), p])) };
  }

  // All parameters, one after another, without rows that are no tokens
  save() { return joined(Object.values(this.params).map(p => this.real(p))); }
  load(numbers) { spread(numbers, Object.values(this.params).map(p => this.real(p))); }
  real(p) {
    return p === this.wte ? p.data.subarray(0, this.config.vocab_size * p.width) : p.data;
  }

  // y = x W^T
  linear(x, W, y, rows) {
    this.kernel.transpose(W.at, W.width, this.turned.at, W.rows, W.width);
    this.kernel.multiply(x.at, W.width, 1, this.turned.at, W.rows, y.at, W.rows, rows, W.rows,
                         W.width, 0);
  }
  // dW += dy^T x, and dx = dy W, or dx += dy W
  linearBack(dy, x, W, dx, rows, keep = 0) {
    this.kernel.multiply(dy.at, 1, W.rows, x.at, W.width, W.grad.at, W.width, W.rows, W.width, rows,
                         1);
    this.kernel.multiply(dy.at, W.rows, 1, W.at, W.width, dx.at, W.width, rows, W.width, W.rows,
                         keep);
  }
  // x += y, or other sums of rows
  add(y, x, rows) { this.kernel.blend(1, y.at, 1, x.at, rows * x.width); }
  normalize(x, w, { out, scale }, rows, centred = 1) {
    this.kernel.normalize(x.at, w.at, out.at, scale.at, rows, x.width, centred);
  }
  normalizeBack(dy, x, w, { scale }, dx, rows, centred = 1) {
    this.kernel.normalizeBack(dy.at, x.at, w.at, scale.at, dx.at, w.grad.at, rows, x.width,
                              centred);
  }
  rotate(x, rows, T, way) {
    const { cos, sin, D } = this;
    for (let h = 0; h < this.heads && this.config.rotary; h++)
      this.kernel.rotate(x.at + 4 * h * D, x.width, cos.at, sin.at, rows, T, D, way);
  }

  // Calls action(addressOf, s) for each window and head: addressOf(x, i) is that of its part of x,
  // from the position i on, and s that of its attention weights (T, T)
  eachHead(layer, rows, T, action) {
    for (let b = 0; b < rows; b += T)
      for (let h = 0; h < this.heads; h++)
        action((x, i = 0) => x.at + 4 * ((b + i) * x.width + h * x.width / this.heads),
               layer.s.at + 4 * (b * this.heads + h * T) * T);
  }
  // s_ij = softmax over j <= i of q_i . k_j / sqrt(D), and mixed_i = sum_j s_ij u_j. The products
  // take some positions i at a time, since none of them looks beyond the last.
  attend(layer, rows, T) {
    const { kernel, D, turned } = this, { q, k, u, mixed } = layer, M = this.M / this.heads;
    const n = T % 16 ? 8 : 16;
    this.eachHead(layer, rows, T, (at, s) => {
      kernel.transpose(at(k), k.width, turned.at, T, D);
      for (let i = 0; i < T; i += n)
        kernel.multiply(at(q, i), q.width, 1, turned.at, T, s + 4 * i * T, T, n, i + n, D, 0);
      kernel.softmax(s, T, T, 1, 1, 1 / Math.sqrt(D));
      for (let i = 0; i < T; i += n)
        kernel.multiply(s + 4 * i * T, T, 1, at(u), u.width, at(mixed, i), mixed.width, n, M, i + n,
                        0);
    });
  }
  // The way back, from dm to dq, dk and du
  attendBack(layer, rows, T) {
    const { kernel, D, turned, dq, dk, du, dm } = this, { q, k, u } = layer;
    const n = T % 16 ? 8 : 16, M = this.M / this.heads, ds = this.ds.at;
    this.eachHead(layer, rows, T, (at, s) => {
      kernel.transpose(at(u), u.width, turned.at, T, M);
      for (let i = 0; i < T; i += n)
        kernel.multiply(at(dm, i), dm.width, 1, turned.at, T, ds + 4 * i * T, T, n, i + n, M, 0);
      kernel.softmaxBack(s, ds, T, T, 1, 1, 1 / Math.sqrt(D));
      for (let i = 0; i < T; i += n) {
        kernel.multiply(ds + 4 * i * T, T, 1, at(k), k.width, at(dq, i), dq.width, n, D, i + n, 0);
        // Position i as the one that is read: by all from i on
        const from = 4 * (i * T + i), later = T - i;
        kernel.multiply(ds + from, 1, T, at(q, i), q.width, at(dk, i), dk.width, n, D, later, 0);
        kernel.multiply(s + from, 1, T, at(dm, i), dm.width, at(du, i), du.width, n, M, later, 0);
      }
    });
  }

  // q, k, u and g: what a layer makes of its normalized input
  project({ W, x, norm1, q, k, u, g }, rows) {
    this.normalize(x, W.ln_1, norm1, rows);
    this.linear(norm1.out, W.c_q, q, rows);
    this.linear(norm1.out, W.c_k, k, rows);
    if (W.c_v) this.linear(norm1.out, W.c_v, u, rows);
    if (W.c_gate) this.linear(norm1.out, W.c_gate, g, rows);
  }
  projectBack({ W, x, norm1 }, { dq, dk, du, dg }, dx, rows) {
    this.linearBack(dq, norm1.out, W.c_q, this.dn, rows);
    this.linearBack(dk, norm1.out, W.c_k, this.dn, rows, 1);
    if (W.c_v) this.linearBack(du, norm1.out, W.c_v, this.dn, rows, 1);
    if (W.c_gate) this.linearBack(dg, norm1.out, W.c_gate, this.dn, rows, 1);
    this.normalizeBack(this.dn, x, W.ln_1, norm1, dx, rows);
  }
  // Calls action(name, width) for each of these that the first layer computes for each token
  projected(action) {
    const { W, q, u } = this.tokens;
    for (const name of ["q", "k"]) action(name, q.width);
    if (W.c_v) action("u", u.width);
    if (W.c_gate) action("g", u.width);
  }

  // The summed loss of whole windows of T tokens; `share` times its gradients are added to grads
  pass(ids, targets, T, share = 0) {
    const { tokens } = this;
    let loss = 0;
    if (tokens) {
      this.project(tokens, this.wte.rows);
      for (const name of ["dq", "dk", "du", "dg"]) tokens[name].data.fill(0);
    }
    for (let first = 0; first < ids.length; first += this.windows * T) {
      const part = list => list.subarray(first, first + this.windows * T);
      loss += this.forward(part(ids), part(targets), T, share);
      if (share) this.backward(part(ids), T);
    }
    // The first layer's input is the token table
    if (tokens && share) this.projectBack(tokens, tokens, this.wte.grad, this.wte.rows);
    return loss;
  }
  forward(ids, targets, T, share) {
    const { kernel, isDVA, layers, stream, logits, wte, wpe, config, tokens } = this;
    const rows = ids.length, C = config.n_embd, x0 = layers[0].x.data;
    ids.forEach((id, i) => x0.set(wte.data.subarray(id * C, (id + 1) * C), i * C));
    for (let i = 0; i < rows && wpe; i += T)
      kernel.blend(1, wpe.at, 1, layers[0].x.at + 4 * i * C, T * C);
    layers.forEach((layer, l) => {
      const { W, x, q, k, u, g, mixed, norm, gated, x2, norm2, z, bent } = layer;
      const next = layers[l + 1]?.x ?? stream;
      if (l > 0 || !tokens) this.project(layer, rows);
      else this.projected((name, width) => ids.forEach((id, i) => kernel.blend(
        1, tokens[name].at + 4 * id * width, 0, layer[name].at + 4 * i * width, width)));
      this.rotate(q, rows, T, 1);
      this.rotate(k, rows, T, 1);
      if (!W.c_v) this.lookUp(W, ids, u);
      this.attend(layer, rows, T);
      let read = mixed;
      if (isDVA) {
        // y_i = W_o [norm(sum_j s_ij u_j) * g_i]
        if (W.norm) this.normalize(mixed, W.norm, norm, rows, 0);
        kernel.times(W.norm ? norm.out.at : mixed.at, g.at, gated.at, rows * this.M);
        read = gated;
      }
      const after = isDVA ? next : x2;
      this.linear(read, W.c_proj, after, rows);
      this.add(x, after, rows);
      if (isDVA) return;
      this.normalize(x2, W.ln_2, norm2, rows);
      this.linear(norm2.out, W["mlp.c_fc"], z, rows);
      kernel.gelu(z.at, bent.at, rows * z.width, config.gelu === "exact");
      this.linear(bent, W["mlp.c_proj"], next, rows);
      this.add(x2, next, rows);
    });
    this.normalize(stream, this.ln_f, this.normF, rows);
    this.linear(this.normF.out, wte, logits, rows);
    kernel.softmax(logits.at, rows, logits.width, config.vocab_size, 0, 1);
    let loss = 0;
    // Of the loss by the logits: their softmax, less 1 at the target
    targets.forEach((id, i) => {
      loss -= Math.log(Math.max(1e-38, logits.data[i * logits.width + id]));
      logits.data[i * logits.width + id] -= 1;
    });
    if (share) kernel.blend(0, logits.at, share, logits.at, rows * logits.width);
    return loss;
  }
  backward(ids, T) {
    const { kernel, isDVA, layers, stream, logits, wte, wpe, config, tokens } = this;
    const { dx, dn, dm, dz, dr } = this;
    const rows = ids.length, C = config.n_embd;
    this.linearBack(logits, this.normF.out, wte, dn, rows);
    dx.data.fill(0);
    this.normalizeBack(dn, stream, this.ln_f, this.normF, dx, rows);
    for (const layer of [...layers].reverse()) {
      const { W, g, mixed, norm, gated, x2, norm2, z, bent } = layer;
      if (!isDVA) {
        this.linearBack(dx, bent, W["mlp.c_proj"], dz, rows);
        kernel.geluBack(z.at, dz.at, rows * z.width, config.gelu === "exact");
        this.linearBack(dz, norm2.out, W["mlp.c_fc"], dn, rows);
        this.normalizeBack(dn, x2, W.ln_2, norm2, dx, rows);
        this.linearBack(dx, mixed, W.c_proj, dm, rows);
      } else {
        const count = rows * this.M;
        this.linearBack(dx, gated, W.c_proj, dz, rows);
        kernel.times(dz.at, g.at, W.norm ? dr.at : dm.at, count);
        // dz becomes the gate's gradient
        kernel.times(dz.at, W.norm ? norm.out.at : mixed.at, dz.at, count);
        if (W.norm) {
          dm.data.fill(0);
          this.normalizeBack(dr, mixed, W.norm, norm, dm, rows, 0);
        }
      }
      this.attendBack(layer, rows, T);
      this.rotate(this.dq, rows, T, -1);
      this.rotate(this.dk, rows, T, -1);
      if (!W.c_v) this.lookUpBack(W, ids);
      const own = { dq: this.dq, dk: this.dk, du: this.du, dg: dz };
      if (layer !== layers[0] || !tokens) this.projectBack(layer, own, dx, rows);
      else this.projected((name, width) => ids.forEach((id, i) => kernel.blend(1,
        own["d" + name].at + 4 * i * width, 1, tokens["d" + name].at + 4 * id * width, width)));
    }
    ids.forEach((id, i) => kernel.blend(1, dx.at + 4 * i * C, 1, wte.grad.at + 4 * id * C, C));
    for (let i = 0; i < rows && wpe; i += T)
      kernel.blend(1, dx.at + 4 * i * C, 1, wpe.grad.at, T * C);
  }
  // A bank's values, u_p = gamma * E[token_p]
  lookUp(W, ids, u) {
    const table = W["bank.table"], gamma = W["bank.gamma"].data[0], M = this.M;
    ids.forEach((id, i) =>
      this.kernel.blend(gamma, table.at + 4 * id * M, 0, u.at + 4 * i * M, M));
  }
  lookUpBack(W, ids) {
    const table = W["bank.table"], gamma = W["bank.gamma"], { du, M } = this;
    ids.forEach((id, i) => {
      for (let m = 0; m < M; m++) gamma.grad.data[0] += du.data[i * M + m] * table.data[id * M + m];
      this.kernel.blend(gamma.data[0], du.at + 4 * i * M, 1, table.grad.at + 4 * id * M, M);
    });
  }

  // ---- the optimizer ---------------------------------------------------------------------------

  // GPT.init_weights() of model.py, with random numbers that follow from the seed
  initialize(seed) {
    const random = randomOf(seed), { n_layer, n_embd: C, vocab_size: V } = this.config;
    const normal = () => Math.sqrt(-2 * Math.log(1 - random())) * Math.cos(2 * Math.PI * random());
    for (const p of Object.values(this.params)) {
      const std = /c_proj/.test(p.name) ? 0.02 / Math.sqrt(2 * n_layer) : 0.02;
      // Scales of norms and banks start at 1; rows that are no tokens stay 0
      const real = p === this.wte ? V * C : p.count;
      for (let n = 0; n < real; n++) p.data[n] = p.rows === 1 ? 1 : std * normal();
    }
    // A bank's table starts as the values that a new W_v would give each token's embedding
    const { normF, kernel } = this, ones = this.ln_f;
    for (const { W } of this.layers.filter(({ W }) => W["bank.table"])) {
      const table = W["bank.table"], w = Float32Array.from({ length: C * this.M }, () =>
        0.02 * normal());
      for (let id = 0; id < V; id++) {
        kernel.normalize(this.wte.at + 4 * id * C, ones.at, normF.out.at, normF.scale.at, 1, C, 1);
        for (let m = 0; m < this.M; m++) {
          table.data[id * this.M + m] = 0;
          for (let c = 0; c < C; c++)
            table.data[id * this.M + m] += normF.out.data[c] * w[m * C + c];
        }
      }
    }
  }

  // One step with the gradients in grads, of the parameters whose index is in `mine`
  update(lr, settings, mine) {
    const norm = Math.hypot(...Object.values(this.params).map(({ grad }) => lengthOf(grad.data)));
    const clip = Math.min(1, settings.grad_clip / (norm + 1e-6)), { beta1, beta2 } = settings;
    this.step++;
    Object.values(this.params).forEach((p, n) => {
      if (mine && !mine.has(n)) return;
      if (isMatrix(p)) this.muon(p, clip, lr, settings);
      else if (p.name.endsWith("table"))
        this.adamW(p, clip, lr * settings.bank_lr, 0.01, 0.8, 0.995, 1e-10);
      else if (!p.name.endsWith("gamma"))
        this.adamW(p, clip, lr * (p.rows > 1 ? settings.embedding_lr : 1),
                   p.rows > 1 ? settings.weight_decay : 0, beta1, beta2, 1e-8);
      // Under DVA's norm gamma has no effect
      else if (!this.isDVA || !this.config.value_norm)
        this.adamW(p, clip, lr * 25, 0, 0.96, 0.95, 1e-10);
    });
  }
  adamW({ data: w, grad: { data: g }, mean: { data: m }, square: { data: v } }, clip, lr, decay,
        beta1, beta2, eps) {
    const rate = lr / (1 - beta1 ** this.step), size = 1 / (1 - beta2 ** this.step);
    for (let n = 0; n < w.length; n++) {
      m[n] += (1 - beta1) * (clip * g[n] - m[n]);
      v[n] += (1 - beta2) * ((clip * g[n]) ** 2 - v[n]);
      w[n] = w[n] * (1 - lr * decay) - rate * m[n] / (Math.sqrt(v[n] * size) + eps);
    }
  }
  // Momentum whose singular values are brought near 1 by five steps x <- a x + (b y + c y^2) x with
  // y = x x^T, before it is applied
  muon(p, clip, lr, { momentum, weight_decay }) {
    const { kernel, ahead, turned, gram, square } = this, { rows, width, count, grad, mean } = p;
    kernel.blend((1 - momentum) * clip, grad.at, momentum, mean.at, count);
    // Nesterov's look ahead: the gradient, moved towards the momentum
    kernel.blend((1 - momentum) * clip, grad.at, 0, ahead.at, count);
    kernel.blend(momentum, mean.at, 1, ahead.at, count);
    const tall = rows > width, R = Math.min(rows, width), N = Math.max(rows, width);
    let x = ahead.at, y = turned.at;
    if (tall) {
      kernel.transpose(x, width, y, rows, width);
      [x, y] = [y, x];
    }
    kernel.blend(0, x, 1 / Math.max(1e-7, lengthOf(ahead.data.subarray(0, count))), x, count);
    for (let n = 0; n < 5; n++) {
      kernel.transpose(x, N, y, R, N);
      kernel.multiply(x, N, 1, y, R, gram.at, R, R, R, N, 0);
      kernel.multiply(gram.at, R, 1, gram.at, R, square.at, R, R, R, R, 0);
      kernel.blend(2.0315, square.at, -4.775, gram.at, R * R);
      kernel.multiply(gram.at, R, 1, x, N, y, N, R, N, R, 0);
      kernel.blend(1, y, 3.4445, x, count);
    }
    if (tall) {
      kernel.transpose(x, N, y, R, N);
      [x, y] = [y, x];
    }
    kernel.blend(-lr * 0.2 * Math.sqrt(N), x, 1 - lr * weight_decay, p.at, count);
  }
}
// Lists one after another in one, and back
function joined(lists) {
  const all = new Float32Array(sum(lists.map(({ length }) => length)));
  let at = 0;
  for (const list of lists) all.set(list, (at += list.length) - list.length);
  return all;
}
function spread(all, lists) {
  let at = 0;
  for (const list of lists) list.set(all.subarray(at, at += list.length));
}
const isMatrix = p => p.rows > 1 && p.name.includes(".h.") && !p.name.endsWith("table");
function lengthOf(list) {
  let square = 0;
  for (let n = 0; n < list.length; n++) square += list[n] * list[n];
  return Math.sqrt(square);
}
// A linear warm-up, then half a cosine from learning_rate down to min_lr
function rateAt(step, steps, { learning_rate, min_lr, warmup }) {
  if (step < warmup) return learning_rate * (step + 1) / (warmup + 1);
  const done = Math.min(1, (step - warmup) / Math.max(1, steps - warmup));
  return min_lr + 0.5 * (1 + Math.cos(Math.PI * done)) * (learning_rate - min_lr);
}

// ---- batches -----------------------------------------------------------------------------------

// Random numbers in [0, 1) that follow from the seed (mulberry32)
function randomOf(seed) {
  return () => {
    seed = seed + 0x6d2b79f5 | 0;
    let x = Math.imul(seed ^ seed >>> 15, 1 | seed);
    x = x + Math.imul(x ^ x >>> 7, 61 | x) ^ x;
    return ((x ^ x >>> 14) >>> 0) / 2 ** 32;
  };
}
// Windows of T tokens, one after another, and the token after each
function windowsAt(ids, starts, T) {
  const count = starts.length * T;
  const batch = { ids: new Uint16Array(count), targets: new Uint16Array(count) };
  starts.forEach((at, n) => {
    batch.ids.set(ids.subarray(at, at + T), n * T);
    batch.targets.set(ids.subarray(at + 1, at + 1 + T), n * T);
  });
  return batch;
}
// Where the windows of a step begin: a function of the seed and the step alone
function startsOf(ids, T, count, seed, step) {
  const random = randomOf(Math.imul(seed, 0x9e3779b1) ^ Math.imul(step, 0x85ebca6b));
  return Array.from({ length: count }, () => Math.floor(random() * (ids.length - T)));
}

// ---- workers: each has all weights and its part of a batch -------------------------------------

// exchange(numbers) gives everybody's numbers, in the order of their ranks
function exchangeOf(rank, ports) {
  const came = ports.map(() => []), own = new MessageChannel();
  let wake = () => {};
  ports.forEach((port, n) => { port.onmessage = ({ data }) => { came[n].push(data); wake(); }; });
  own.port1.onmessage = () => wake();
  return async numbers => {
    for (const port of ports) {
      // A copy that is handed over costs a third of one that the browser makes
      const copy = numbers.slice();
      port.postMessage(copy, [copy.buffer]);
    }
    // A worker without others waits, too, so that the page's orders come in
    const turn = new Promise(resolve => { wake = resolve; });
    if (!ports.length) own.port2.postMessage(0);
    if (!ports.length || came.some(list => !list.length)) await turn;
    while (came.some(list => !list.length)) await new Promise(resolve => { wake = resolve; });
    const all = came.map(list => list.shift());
    return [...all.slice(0, rank), numbers, ...all.slice(rank)];
  };
}
// Whose parameters each of `count` workers brings up to date: the costliest first, to who has least
function sharesOf(params, count) {
  const shares = Array.from({ length: count }, () => ({ cost: 0, mine: new Set() }));
  const costs = params.map((p, n) =>
    [isMatrix(p) ? 30 * p.count * Math.min(p.rows, p.width) : 20 * p.count, n]);
  for (const [cost, n] of costs.sort(([a], [b]) => b - a)) {
    const least = shares.reduce((a, b) => b.cost < a.cost ? b : a);
    least.cost += cost;
    least.mine.add(n);
  }
  return shares.map(({ mine }) => mine);
}

// Worker `rank` of ports.length + 1 trains from the page's first message on. The page's orders are
// how far to go, and whether to pause; say() sends to the page, from rank 0 alone.
async function trainTogether(job, ports, orders, say) {
  const { rank, config, settings, train, val, modules } = job;
  const learner = new Learner(config, modules), exchange = exchangeOf(rank, ports);
  const { batch_size: B, seed, moments } = settings, T = config.block_size;
  const count = ports.length + 1, params = Object.values(learner.params);
  const shares = sharesOf(params, count), own = r => [...shares[r]].map(n => params[n].data);
  const part = list => list.slice(Math.floor(list.length * rank / count),
                                  Math.floor(list.length * (rank + 1) / count));
  const passOn = step => {
    const batch = windowsAt(train, part(startsOf(train, T, B, seed, step)), T);
    learner.grads.fill(0);
    learner.note.data[0] = learner.pass(batch.ids, batch.targets, T, 1 / (B * T)) / (B * T);
  };
  // The mean loss of so many windows of the validation split, spread evenly, or of all
  async function evaluate(most) {
    const all = Math.floor((val.length - 1) / T), windows = Math.min(all, most);
    const starts = Array.from({ length: windows }, (_, n) => Math.floor(n * all / windows) * T);
    const { ids, targets } = windowsAt(val, part(starts), T);
    const losses = await exchange(Float64Array.of(learner.pass(ids, targets, T)));
    return sum(losses.map(([loss]) => loss)) / (windows * T);
  }

  learner.initialize(seed);
  if (settings.probe) {
    const times = [0, 1, 2].map(step => {
      const began = performance.now();
      passOn(step);
      learner.update(0, settings, sharesOf(params, settings.probe)[0]);
      return (performance.now() - began) / 1000;
    });
    return say({ seconds: Math.min(...times) });
  }
  if (job.weights) learner.load(job.weights);
  let first = 0, step = 0, { until } = orders;
  for (;;) {
    const isLast = step >= until, every = Math.ceil((until - first) / moments);
    if (isLast || (step - first) % every === 0)
      say({ step, isLast, val: await evaluate(32), whole: isLast && await evaluate(Infinity),
            weights: learner.save() });
    if (orders.isPaused) say({ step, isPaused: true, weights: learner.save() });
    while (orders.isPaused || step >= orders.until)
      await new Promise(resolve => { orders.wake = resolve; });
    if (isLast) first = step;

    passOn(step);
    learner.note.data[1] = orders.until;
    const [grads, ...others] = await exchange(learner.grads.slice());
    // The first worker's orders count for all, so that they stay in step
    until = grads.at(-1);
    learner.grads.set(grads);
    for (const other of others)
      for (let n = 0; n < other.length; n++) learner.grads[n] += other[n];
    learner.update(rateAt(step - first, until - first, settings), settings, shares[rank]);
    const weights = await exchange(joined(own(rank)));
    weights.forEach((theirs, r) => { if (r !== rank) spread(theirs, own(r)); });
    say({ step: ++step, loss: learner.note.data[0] });
  }
}
if (globalThis.WorkerGlobalScope) {
  const orders = { until: 0, isPaused: false, wake() {} };
  onmessage = ({ data, ports }) => {
    Object.assign(orders, data.orders);
    const say = message => { if (data.job.rank === 0) postMessage(message); };
    // What fails later would not reach the page
    if (data.job)
      trainTogether(data.job, ports, orders, say).catch(error => setTimeout(() => { throw error; }));
    orders.wake();
  };
}

// ---- on the page -------------------------------------------------------------------------------

// config/speedrun.py's: the settings of the model, and those of its training
const SHAPE = {
  block: "dva", n_layer: 2, n_head: 4, n_embd: 96, qk_dim: 32, value_dim: 0, value_norm: true,
  rotary: "only", bank_layers: 0, gelu: "exact", bias: false, dropout: 0, block_size: 64 };
const DEFAULTS = {
  ...SHAPE, batch_size: 24, steps: 250, seed: 1, learning_rate: 1.2e-2, min_lr: 5e-4, warmup: 5,
  embedding_lr: 4, bank_lr: 32, weight_decay: 0.1, momentum: 0.95, beta1: 0.9, beta2: 0.99,
  grad_clip: 1, moments: 20 };

// One for each core, up to four
const workersFor = ({ batch_size = DEFAULTS.batch_size }) =>
  Math.min(4, navigator.hardwareConcurrency || 1, batch_size);
// A text's code points, and the characters that it has, in the order of their codes
function codesOf(text) {
  const codes = new Uint32Array(text.length);
  let count = 0;
  for (let at = 0; at < text.length; at += codes[count++] > 65535 ? 2 : 1)
    codes[count] = text.codePointAt(at);
  return codes.subarray(0, count);
}
function alphabetOf(codes) {
  const isThere = new Uint8Array(0x110000), found = [];
  for (let n = 0; n < codes.length; n++) isThere[codes[n]] = 1;
  for (let code = isThere.indexOf(1); code >= 0; code = isThere.indexOf(1, code + 1))
    found.push(String.fromCodePoint(code));
  return found;
}

// A model that learns a text, in workers. `hear` gets each message of the first of them.
class Lesson {
  constructor({ text, vocab, weights, modules, workers, ...given }, hear) {
    const all = this.settings = { ...DEFAULTS, ...given };
    this.config = Object.fromEntries(Object.keys(SHAPE).map(name => [name, all[name]]));
    const codes = codesOf(text);
    this.tokens = vocab ?? alphabetOf(codes);
    this.config.vocab_size = this.tokens.length;
    const ids = this.encode(codes), cut = Math.floor(0.9 * ids.length);
    const [train, val] = [ids.slice(0, cut), ids.slice(cut)];
    this.check(train, val);
    this.val = val;
    const count = all.probe ? 1 : workers ?? workersFor(all);
    const source = document.getElementById("learn").textContent;
    Lesson.url ??= URL.createObjectURL(new Blob([source], { type: "text/javascript" }));
    this.workers = Array.from({ length: count }, () => new Worker(Lesson.url));
    const ports = this.workers.map(() => []);
    for (let a = 0; a < count; a++)
      for (let b = 0; b < a; b++) {
        // In the order of ranks at both ends
        const { port1, port2 } = new MessageChannel();
        ports[a][b] = port1;
        ports[b][a - 1] = port2;
      }
    this.done = new Promise((resolve, reject) => {
      this.workers.forEach((worker, rank) => {
        worker.onerror = event => reject(Error(`a worker has stopped: ${event.message}`));
        worker.onmessage = ({ data }) => {
          if (data.isLast || data.seconds) resolve(data);
          hear?.(data);
        };
        const job = { rank, config: this.config, settings: all, train, val, weights,
                      modules: modules ?? kernelsOfThePage() };
        worker.postMessage({ orders: { until: all.steps }, job }, ports[rank]);
      });
    });
  }
  encode(codes) {
    const idOf = new Int32Array(0x110000).fill(-1), unknown = new Set();
    this.tokens.forEach((letter, id) => { idOf[letter.codePointAt(0)] = id; });
    const ids = new Uint16Array(codes.length);
    for (let n = 0; n < codes.length; n++) {
      ids[n] = idOf[codes[n]];
      if (idOf[codes[n]] < 0) unknown.add(String.fromCodePoint(codes[n]));
    }
    if (unknown.size)
      throw Error(`this model does not know “${[...unknown].slice(0, 20).join("")}”: take these `
        + "characters out of the text, or train a new model");
    return ids;
  }
  check(train, val) {
    const { block_size: T, n_embd: C, n_head, qk_dim, value_dim, block } = this.config;
    const widths = { block_size: T, n_embd: C, ...block === "dva"
      ? { qk_dim, value_dim: value_dim || C } : { "n_embd / n_head": C / n_head } };
    for (const [name, width] of Object.entries(widths))
      if (width % 8) throw Error(`${name} is ${width}: here it must be a multiple of 8`);
    if (Math.min(train.length, val.length) <= T)
      throw Error(`the text has ${train.length + val.length} characters, and needs more than `
        + `${10 * T + 10}: a tenth is kept for validation, and a window has ${T}`);
  }
  // {isPaused}, or {until}: the step at which to end
  order(orders) {
    // When the first worker pauses, the others wait for it
    const those = "isPaused" in orders ? this.workers.slice(0, 1) : this.workers;
    for (const worker of those) worker.postMessage({ orders });
  }
  end() { for (const worker of this.workers) worker.terminate(); }
}

// Train a model on a text: a promise of {losses, val_loss, seconds, weights, config, tokens}
async function teach({ onstep, ...options }) {
  const began = performance.now(), losses = [];
  const lesson = new Lesson(options, message => {
    if ("loss" in message) losses.push(message.loss);
    onstep?.(message);
  });
  try {
    const { whole, weights } = await lesson.done;
    return { losses, val_loss: whole, seconds: (performance.now() - began) / 1000, weights,
             config: lesson.config, tokens: lesson.tokens };
  } finally {
    lesson.end();
  }
}
