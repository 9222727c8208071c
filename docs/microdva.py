"""
Dynamic Value Attention (DVA) in plain Python, all of it: from a list of names to new names.

    python docs/microdva.py               # learns the names below and invents others
    python docs/microdva.py lines.txt     # the same with short lines of your own

Read it from top to bottom: that is the lesson. Position i attends to the positions j <= i. model.py
computes the same faster, with --block=dva --rotary=only. In the spirit of Karpathy's microgpt.
"""
# ruff: noqa: B905
import cmath
import math
import random
import sys
from operator import add, mul

# C numbers in the residual stream, D in queries and keys, M in values and gates
C, D, M, LAYERS, STEPS, LEARNING_RATE = 24, 12, 24, 2, 2000, 0.005
NAMES = """
aemilia alonso angelo antonio ariel audrey autolycus balthasar banquo baptista bardolph bassanio
beatrice benedick benvolio bertram bianca brabantio brutus caliban camillo cassandra cassius claudio
cleopatra constance cordelia coriolanus cressida cymbeline demetrius desdemona diana dogberry duncan
edgar edmund emilia falstaff ferdinand francisco gertrude goneril gonzalo hamlet helena hermia
hermione hippolyta horatio imogen isabella jessica juliet laertes lavinia lorenzo lucentio macbeth
malcolm malvolio marcellus mariana mercutio miranda nerissa octavia olivia ophelia orlando orsino
othello paulina perdita pericles petruchio portia posthumus prospero roderigo romeo rosalind
sebastian silvia stephano tamora theseus troilus ulysses valentine viola"""


# ---- 1. Vectors that know their derivatives ------------------------------------------------------

TAPE = []       # every vector, in the order in which they are computed

class Vector:
    """A list of numbers, and in grad the derivative of the loss by each of them"""
    def __init__(self, data, pass_back=lambda d: None):
        self.data, self.grad, self.pass_back = data, [0.0] * len(data), pass_back
        TAPE.append(self)

    def receive(self, d):
        self.grad = [*map(add, self.grad, d)]

    def __add__(self, other):
        return mix(Vector([1.0, 1.0]), [self, other])

    def __mul__(self, other):
        if len(other.data) == 1:                    # one number multiplies every channel
            return mix(other, [self])
        def pass_back(d):
            self.receive(map(mul, d, other.data))
            other.receive(map(mul, d, self.data))
        return Vector([*map(mul, self.data, other.data)], pass_back)

def backward():
    """The chain rule: from the last vector to the first, each passes its derivatives back"""
    while TAPE:
        vector = TAPE.pop()
        vector.pass_back(vector.grad)

def dot(a, b):
    return sum(map(mul, a, b))

def linear(matrix, x):
    """W x, where W is a list of rows: number r of the result is row_r . x"""
    def pass_back(d):
        x.receive([dot(d, column) for column in zip(*[row.data for row in matrix])])
        for row, d_r in zip(matrix, d):
            row.receive([d_r * x_c for x_c in x.data])
    return Vector([dot(row.data, x.data) for row in matrix], pass_back)

def mix(weights, vectors):
    """sum_j weights_j vectors_j"""
    def pass_back(d):
        weights.receive([dot(d, vector.data) for vector in vectors])
        for vector, weight in zip(vectors, weights.data):
            vector.receive([weight * d_c for d_c in d])
    channels = zip(*[vector.data for vector in vectors])
    return Vector([dot(weights.data, channel) for channel in channels], pass_back)

def softmax(x):
    """p_j = exp(x_j) / sum_k exp(x_k): positive numbers whose sum is 1"""
    exps = [math.exp(x_j) for x_j in x.data]
    p = [exp / sum(exps) for exp in exps]
    return Vector(p, lambda d: x.receive([p_j * (d_j - dot(p, d)) for p_j, d_j in zip(p, d)]))

def one_over_size(x):
    """1 / sqrt(mean of x_c^2 + 0.00001)"""
    r = (dot(x.data, x.data) / len(x.data) + 1e-5) ** -0.5
    return Vector([r], lambda d: x.receive([-d[0] * r ** 3 / len(x.data) * c for c in x.data]))

def layer_norm(x, weight):
    """w * (x - mean of x) / size"""
    x = x + Vector([1.0] * C) * linear([Vector([-1 / C] * C)], x)
    return weight * x * one_over_size(x)

def rotate(x, position):
    """Rotary positions: a product of rotated q_i and k_j depends on the distance i - j alone"""
    def rotated(x, position):
        # Channels c and c + D/2 are the two parts of a complex number
        pairs = [complex(a, b) * cmath.rect(1, position / 10000 ** (2 * c / D))
                 for c, (a, b) in enumerate(zip(x, x[D // 2:]))]
        return [pair.real for pair in pairs] + [pair.imag for pair in pairs]
    return Vector(rotated(x.data, position), lambda d: x.receive(rotated(d, -position)))


# ---- 2. Dynamic Value Attention ------------------------------------------------------------------

def attention(x, w, build_pairs):
    """y_i = W_o [ sum over j <= i of s_ij v_ij ], for the vectors x of all positions"""
    # From each position a query q_i, a key k_i, a gate g_i and a value u_i
    q = [rotate(linear(w["c_q"], x_i), i) for i, x_i in enumerate(x)]          # R_i W_q x_i
    k = [rotate(linear(w["c_k"], x_i), i) for i, x_i in enumerate(x)]          # R_i W_k x_i
    g = [linear(w["c_gate"], x_i) for x_i in x]                                # W_g x_i
    u = [linear(w["c_v"], x_i) for x_i in x]                                   # W_v x_i

    # s_ij = softmax over j <= i of q_i . k_j / sqrt(D): how strongly i attends to j
    s = [softmax(linear(k[:i + 1], q_i) * Vector([D ** -0.5])) for i, q_i in enumerate(q)]

    # m_i = sum_j s_ij u_j: ordinary attention, in which u_j is the same for every i
    m = [mix(s_i, u[:i + 1]) for i, s_i in enumerate(s)]

    # a_i = w * g_i / size of m_i: the gate, after RMSNorm has divided by one number for each i
    a = [w["norm"] * g_i * one_over_size(m_i) for g_i, m_i in zip(g, m)]

    if build_pairs:
        # v_ij = a_i * u_j: a value of its own for every pair, a tensor (T, T, M)
        v = [[a_i * u_j for u_j in u[:i + 1]] for i, a_i in enumerate(a)]
        y = [mix(s_i, v_i) for s_i, v_i in zip(s, v)]
    else:
        # sum_j s_ij (a_i * u_j) = a_i * sum_j s_ij u_j, since a_i does not depend on j
        y = [a_i * m_i for a_i, m_i in zip(a, m)]
    return [linear(w["c_proj"], y_i) for y_i in y]

def gpt(w, ids, build_pairs=False):
    """The logits of the token after each of the ids. Layers add to the residual stream x; no MLP"""
    x = [w["wte"][token] for token in ids]
    for layer in w["layers"]:
        y = attention([layer_norm(x_i, layer["ln_1"]) for x_i in x], layer, build_pairs)
        x = [x_i + y_i for x_i, y_i in zip(x, y)]
    # The table that embeds the tokens also scores the next one
    return [linear(w["wte"], layer_norm(x_i, w["ln_f"])) for x_i in x]

def new_weights(vocab_size):
    """Small random matrices; the weights of norms are 1"""
    def matrix(rows, columns):
        return [Vector([random.gauss(0, 0.2) for _ in range(columns)]) for _ in range(rows)]
    layers = [dict(ln_1=Vector([1.0] * C), c_q=matrix(D, C), c_k=matrix(D, C), c_gate=matrix(M, C),
                   c_v=matrix(M, C), norm=Vector([1.0] * M), c_proj=matrix(C, M))
              for _ in range(LAYERS)]
    return dict(wte=matrix(vocab_size, C), layers=layers, ln_f=Vector([1.0] * C))


# ---- 3. Learn, and invent ------------------------------------------------------------------------

def loss_and_gradients(w, ids):
    """The mean of -log p_token over the next tokens; the weights receive its derivatives"""
    loss, n = 0.0, len(ids) - 1
    for logits, token in zip(gpt(w, ids[:-1]), ids[1:]):
        p = softmax(logits).data
        loss -= math.log(p[token]) / n
        # The derivative of -log p_token by the logits: p, less 1 at the token
        logits.receive([(p_j - (j == token)) / n for j, p_j in enumerate(p)])
    backward()
    return loss

def invent(w, alphabet):
    """A new text: one token after another, sampled from the model's probabilities"""
    ids = [0]
    while ids.count(0) < 2 and len(ids) < 32:
        logits = gpt(w, ids)[-1]
        ids += random.choices(range(len(alphabet)), [math.exp(x / 0.6) for x in logits.data])
    TAPE.clear()
    return "".join(alphabet[token] for token in ids).strip()

if __name__ == "__main__":
    random.seed(1)
    lines = open(sys.argv[1], encoding="utf-8") if sys.argv[1:] else NAMES.split()
    lines = ["\n" + line.strip() + "\n" for line in lines]     # token 0 begins and ends a text
    alphabet = sorted({*"".join(lines)}, key=lambda letter: (letter != "\n", letter))
    texts = [[alphabet.index(letter) for letter in line] for line in lines]
    w = new_weights(len(alphabet))
    rows = TAPE[:]                                  # nothing else is on the tape yet
    for row in rows:
        row.mean = row.square = row.grad
    built, not_built = gpt(w, texts[0], build_pairs=True), gpt(w, texts[0])
    print("All v_ij built, or not: the logits differ by at most",
          max(abs(a - b) for x, y in zip(built, not_built) for a, b in zip(x.data, y.data)))
    mean_loss = math.log(len(alphabet))             # that of a guess
    for step in range(1, STEPS + 1):
        mean_loss += 0.01 * (loss_and_gradients(w, random.choice(texts)) - mean_loss)
        # AdamW: a step against the mean of the gradients, over the root of their mean square
        rate = LEARNING_RATE * (1 - step / STEPS) * math.sqrt(1 - 0.99 ** step) / (1 - 0.9 ** step)
        for row in rows:
            row.mean = [m + 0.1 * (d - m) for m, d in zip(row.mean, row.grad)]
            row.square = [s + 0.01 * (d * d - s) for s, d in zip(row.square, row.grad)]
            row.data = [x - rate * (m / (math.sqrt(s) + 1e-8) + 0.1 * x)
                        for x, m, s in zip(row.data, row.mean, row.square)]
            row.grad = [0.0] * len(row.grad)
        if step % 100 == 0:
            print(f"{step:4}  loss {mean_loss:.2f} ", *[invent(w, alphabet) for _ in range(8)])
