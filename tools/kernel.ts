// The inner loops of training, four numbers at a time: WebAssembly SIMD, written in AssemblyScript.
// What each of them computes is said in plain JavaScript by class Plain in tools/learn.js.
//
//   npm install assemblyscript@0.28.20
//   npx asc tools/kernel.ts -o tools/kernel.wasm -O3 --runtime stub --importMemory --enable simd
//   the same with -o tools/kernel_relaxed.wasm and --enable relaxed-simd after --enable simd
//
// Addresses are in bytes, strides and counts in numbers. Widths are multiples of 8, rows of 4.

// @ts-ignore: decorator
@inline function madd(a: v128, b: v128, c: v128): v128 {            // a b + c
  if (ASC_FEATURE_RELAXED_SIMD) return f32x4.relaxed_madd(a, b, c);
  return f32x4.add(f32x4.mul(a, b), c);
}
// @ts-ignore: decorator
@inline function num(x: f32): v128 { return f32x4.splat(x); }
// @ts-ignore: decorator
@inline function total(x: v128): f32 {
  return f32x4.extract_lane(x, 0) + f32x4.extract_lane(x, 1)
       + f32x4.extract_lane(x, 2) + f32x4.extract_lane(x, 3);
}
// e^x = 2^n e^r with |r| <= ln(2) / 2, and e^r by its series. Adding 1.5 * 2^23 rounds to n, and
// leaves it in the last bits. Below e^-80 it is 0, since numbers without a leading bit are slow.
// @ts-ignore: decorator
@inline function exp(x: v128): v128 {
  const isSeen = f32x4.gt(x, num(-80));
  x = f32x4.pmin(f32x4.pmax(x, num(-80)), num(80));
  const bits = madd(x, num(1.44269504), num(12582912)), n = f32x4.sub(bits, num(12582912));
  const r = madd(n, num(2.12194440e-4), madd(n, num(-0.693359375), x));
  let p = madd(r, num(1 / 720), num(1 / 120));
  p = madd(r, madd(r, madd(r, p, num(1 / 24)), num(1 / 6)), num(0.5));
  p = madd(r, madd(r, p, num(1)), num(1));
  p = f32x4.mul(p, i32x4.add(i32x4.shl(bits, 23), i32x4.splat(127 << 23)));
  return v128.and(p, isSeen);
}

// C (M, N) = A B, or C + A B. Element (m, k) of A is at m * ar + k * ac, so A may be transposed.
export function multiply(A: usize, ar: usize, ac: usize, B: usize, br: usize, C: usize, cr: usize,
                         M: usize, N: usize, K: usize, keep: bool): void {
  ar *= 4; ac *= 4; br *= 4; cr *= 4;
  for (let m: usize = 0; m < M; m += 4)
    for (let n: usize = 0; n < N; n += 8) {
      let a0 = A + m * ar, a1 = a0 + ar, a2 = a1 + ar, a3 = a2 + ar, b = B + 4 * n;
      let c0 = num(0), c1 = c0, c2 = c0, c3 = c0, c4 = c0, c5 = c0, c6 = c0, c7 = c0;
      for (let k: usize = 0; k < K; k++) {
        const x = v128.load(b), y = v128.load(b, 16);
        let a = v128.load32_splat(a0);
        c0 = madd(a, x, c0); c1 = madd(a, y, c1); a = v128.load32_splat(a1);
        c2 = madd(a, x, c2); c3 = madd(a, y, c3); a = v128.load32_splat(a2);
        c4 = madd(a, x, c4); c5 = madd(a, y, c5); a = v128.load32_splat(a3);
        c6 = madd(a, x, c6); c7 = madd(a, y, c7);
        a0 += ac; a1 += ac; a2 += ac; a3 += ac; b += br;
      }
      let c = C + m * cr + 4 * n;
      put(c, c0, c1, keep); c += cr;
      put(c, c2, c3, keep); c += cr;
      put(c, c4, c5, keep); c += cr;
      put(c, c6, c7, keep);
    }
}
// @ts-ignore: decorator
@inline function put(at: usize, x: v128, y: v128, keep: bool): void {
  if (keep) {
    x = f32x4.add(x, v128.load(at));
    y = f32x4.add(y, v128.load(at, 16));
  }
  v128.store(at, x);
  v128.store(at, y, 16);
}

// B (N, M) = A^T for A (M, N), whose rows are ar apart
export function transpose(A: usize, ar: usize, B: usize, M: usize, N: usize): void {
  for (let m: usize = 0; m < M; m += 4)
    for (let n: usize = 0; n < N; n += 4) {
      let a = A + 4 * (m * ar + n), b = B + 4 * (n * M + m);
      const w = v128.load(a), x = v128.load(a + 4 * ar), y = v128.load(a + 8 * ar),
            z = v128.load(a + 12 * ar);
      const wx = v128.shuffle<f32>(w, x, 0, 4, 1, 5), yz = v128.shuffle<f32>(y, z, 0, 4, 1, 5);
      const WX = v128.shuffle<f32>(w, x, 2, 6, 3, 7), YZ = v128.shuffle<f32>(y, z, 2, 6, 3, 7);
      v128.store(b, v128.shuffle<f32>(wx, yz, 0, 1, 4, 5));
      v128.store(b + 4 * M, v128.shuffle<f32>(wx, yz, 2, 3, 6, 7));
      v128.store(b + 8 * M, v128.shuffle<f32>(WX, YZ, 0, 1, 4, 5));
      v128.store(b + 12 * M, v128.shuffle<f32>(WX, YZ, 2, 3, 6, 7));
    }
}

// Rows of y = (x - mean) * scale * w with scale = 1 / sqrt(variance + 1e-5), which is stored. An
// RMSNorm is the same without the mean: centred is 0.
export function normalize(x: usize, w: usize, y: usize, scale: usize, rows: usize, C: usize,
                          centred: f32): void {
  for (const end = scale + 4 * rows; scale < end; scale += 4, x += 4 * C, y += 4 * C) {
    let sum = num(0), square = num(0);
    for (let c: usize = 0; c < 4 * C; c += 16) sum = f32x4.add(sum, v128.load(x + c));
    const mean = num(centred * total(sum) / <f32>C);
    for (let c: usize = 0; c < 4 * C; c += 16) {
      const d = f32x4.sub(v128.load(x + c), mean);
      square = madd(d, d, square);
    }
    const s: f32 = 1 / sqrt<f32>(total(square) / <f32>C + 1e-5);
    for (let c: usize = 0; c < 4 * C; c += 16)
      v128.store(y + c, f32x4.mul(f32x4.mul(f32x4.sub(v128.load(x + c), mean), num(s)),
                                  v128.load(w + c)));
    store<f32>(scale, s);
  }
}
// The way back: dw += sum over rows of dy n, where n = (x - mean) * scale, and
// dx += scale (dn - mean(dn) - n mean(dn n)), where dn = dy w
export function normalizeBack(dy: usize, x: usize, w: usize, scale: usize, dx: usize, dw: usize,
                              rows: usize, C: usize, centred: f32): void {
  for (const end = scale + 4 * rows; scale < end; scale += 4) {
    const s = num(load<f32>(scale));
    let sum = num(0), first = num(0), second = num(0);
    for (let c: usize = 0; c < 4 * C; c += 16) sum = f32x4.add(sum, v128.load(x + c));
    const mean = num(centred * total(sum) / <f32>C);
    for (let c: usize = 0; c < 4 * C; c += 16) {
      const n = f32x4.mul(f32x4.sub(v128.load(x + c), mean), s), d = v128.load(dy + c);
      const dn = f32x4.mul(d, v128.load(w + c));
      v128.store(dw + c, madd(d, n, v128.load(dw + c)));
      first = f32x4.add(first, dn);
      second = madd(dn, n, second);
    }
    const a = num(centred * total(first) / <f32>C), b = num(total(second) / <f32>C);
    for (let c: usize = 0; c < 4 * C; c += 16) {
      const n = f32x4.mul(f32x4.sub(v128.load(x + c), mean), s);
      const dn = f32x4.mul(v128.load(dy + c), v128.load(w + c));
      const d = f32x4.sub(f32x4.sub(dn, a), f32x4.mul(n, b));
      v128.store(dx + c, madd(d, s, v128.load(dx + c)));
    }
    x += 4 * C; dx += 4 * C; dy += 4 * C;
  }
}

// Each row of s becomes the softmax of factor * s over its first `seen` numbers, and 0 after them.
// The next row sees `more` numbers more.
export function softmax(s: usize, rows: usize, width: usize, seen: usize, more: usize,
                        factor: f32): void {
  for (const end = s + 4 * rows * width; s < end; s += 4 * width, seen += more) {
    const used = seen + 3 >> 2 << 4;
    // What is not seen becomes so low that its power is 0
    for (let c: usize = 4 * seen; c < used; c += 4) store<f32>(s + c, -Infinity);
    let top = num(-Infinity), sum = num(0);
    for (let c: usize = 0; c < used; c += 16) top = f32x4.pmax(top, v128.load(s + c));
    const most = num(factor * max(max(f32x4.extract_lane(top, 0), f32x4.extract_lane(top, 1)),
                                  max(f32x4.extract_lane(top, 2), f32x4.extract_lane(top, 3))));
    for (let c: usize = 0; c < used; c += 16) {
      const power = exp(f32x4.sub(f32x4.mul(v128.load(s + c), num(factor)), most));
      sum = f32x4.add(sum, power);
      v128.store(s + c, power);
    }
    const share = num(1 / total(sum));
    for (let c: usize = 0; c < used; c += 16)
      v128.store(s + c, f32x4.mul(v128.load(s + c), share));
    for (let c = used; c < 4 * width; c += 16) v128.store(s + c, num(0));
  }
}
// ds = s (ds - sum(ds s)) factor, in place
export function softmaxBack(s: usize, ds: usize, rows: usize, width: usize, seen: usize,
                            more: usize, factor: f32): void {
  for (const end = s + 4 * rows * width; s < end; s += 4 * width, ds += 4 * width, seen += more) {
    const used = seen + 3 >> 2 << 4;
    let sum = num(0);
    for (let c: usize = 0; c < used; c += 16)
      sum = madd(v128.load(s + c), v128.load(ds + c), sum);
    const mean = num(total(sum));
    for (let c: usize = 0; c < used; c += 16)
      v128.store(ds + c, f32x4.mul(f32x4.mul(f32x4.sub(v128.load(ds + c), mean), num(factor)),
                                   v128.load(s + c)));
    for (let c = used; c < 4 * width; c += 16) v128.store(ds + c, num(0));
  }
}

// y = a x + b y
export function blend(a: f32, x: usize, b: f32, y: usize, count: usize): void {
  for (const end = y + 4 * count; y < end; y += 16, x += 16)
    v128.store(y, madd(num(a), v128.load(x), f32x4.mul(num(b), v128.load(y))));
}
// y = a b, element by element
export function times(a: usize, b: usize, y: usize, count: usize): void {
  for (const end = y + 4 * count; y < end; y += 16, a += 16, b += 16)
    v128.store(y, f32x4.mul(v128.load(a), v128.load(b)));
}
// Rotate the pairs (c, c + D / 2) of rows of D numbers, `skip` apart: by the angles whose cosines
// and sines are in the tables (T, D / 2), where row r is at position r mod T; way = -1: back
export function rotate(x: usize, skip: usize, cos: usize, sin: usize, rows: usize, T: usize,
                       D: usize, way: f32): void {
  for (let r: usize = 0; r < rows; r++, x += 4 * skip)
    for (let c: usize = 0; c < 2 * D; c += 16) {
      const at: usize = 2 * D * (r % T) + c, C = v128.load(cos + at), S = v128.load(sin + at);
      const s = f32x4.mul(S, num(way)), a = v128.load(x + c), b = v128.load(x + c + 2 * D);
      v128.store(x + c, f32x4.sub(f32x4.mul(a, C), f32x4.mul(b, s)));
      v128.store(x + c + 2 * D, madd(b, C, f32x4.mul(a, s)));
    }
}

// y = gelu(z) = z phi(z), and dz = dy gelu'(z): with the tanh of OpenAI's GPT-2, or exact, by an
// approximation of the error function whose error is below 2e-7 (Abramowitz and Stegun, 7.1.26)
export function gelu(z: usize, y: usize, count: usize, exact: bool): void {
  for (const end = z + 4 * count; z < end; z += 16, y += 16) {
    const x = v128.load(z);
    v128.store(y, f32x4.mul(x, phi(x, exact)));
  }
}
export function geluBack(z: usize, dy: usize, count: usize, exact: bool): void {
  for (const end = z + 4 * count; z < end; z += 16, dy += 16) {
    const x = v128.load(z), p = phi(x, exact), square = f32x4.mul(x, x);
    let slope: v128;
    if (exact) slope = f32x4.mul(exp(f32x4.mul(square, num(-0.5))), num(0.39894228));
    else slope = f32x4.mul(f32x4.mul(f32x4.mul(p, f32x4.sub(num(1), p)), num(1.59576912)),
                           madd(square, num(0.134145), num(1)));
    v128.store(dy, f32x4.mul(v128.load(dy), madd(x, slope, p)));
  }
}
// @ts-ignore: decorator
@inline function phi(x: v128, exact: bool): v128 {
  if (!exact) {
    const t = f32x4.mul(x, madd(f32x4.mul(x, x), num(0.0713548162), num(1.59576912)));
    return f32x4.div(num(1), f32x4.add(num(1), exp(f32x4.neg(t))));
  }
  const far = f32x4.abs(f32x4.mul(x, num(0.70710678)));
  const t = f32x4.div(num(1), madd(far, num(0.3275911), num(1)));
  let p = madd(t, num(1.061405429), num(-1.453152027));
  p = madd(t, madd(t, madd(t, p, num(1.421413741)), num(-0.284496736)), num(0.254829592));
  const tail = f32x4.mul(f32x4.mul(num(0.5), f32x4.mul(p, t)),
                         exp(f32x4.neg(f32x4.mul(far, far))));
  return v128.bitselect(tail, f32x4.sub(num(1), tail), f32x4.lt(x, num(0)));
}
