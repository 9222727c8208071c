"""
The machine: device, dtype, compilation, the group of processes and the signals that stop a run.
"""
import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import math
import os
import re
import shutil
import signal
import sys
import sysconfig
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
from tqdm import tqdm

from model import Attention, BankOfValues
from nanodva.errors import UserError, fail

# torchrun tells each process its number and how many there are
RANK = int(os.environ.get("RANK", 0))
WORLD = int(os.environ.get("WORLD_SIZE", 1))

DTYPES = ("float32", "bfloat16", "float16")

# In glibc's malloc.h: from how many bytes on a block is mapped on its own
M_MMAP_THRESHOLD = -3


def say(text):
    """Print a line, once for all processes, above the bars if there are any."""
    if RANK == 0:
        with tqdm.external_write_mode():
            print(text, flush=True)


def bar(*args, **options):
    """A bar of tqdm's, once for all processes, where standard error is a terminal."""
    # In a terminal that does not tell its size tqdm 4.70 would show nothing; this takes 80 x 24
    columns, lines = shutil.get_terminal_size()
    # disable=None is tqdm's word for terminals only
    return tqdm(*args, leave=False, ncols=columns - 1, nrows=lines, disable=RANK > 0 or None,
                **options)


def pick_device(name):
    """
    The torch.device called name; auto is cuda, else mps, else cpu. Under torchrun each process
    has a GPU of its own. Raises UserError for a device that this machine lacks.
    """
    present = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if torch.cuda.is_available():
        present.insert(0, "cuda")
    if torch.backends.mps.is_available():
        present.append("mps")
    present.append("cpu")
    if name not in ("auto", *present):
        fail(f"device={name!r} is not on this machine: choose from {', '.join(present)}")
    device = torch.device(present[0] if name == "auto" else name)
    if device.type == "cuda" and WORLD > 1:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    return device


def pick_dtype(name, device, n_embd):
    """
    The name of the type in which matrices are multiplied; it is `name` unless that is auto. auto:
    on CUDA bfloat16 or, where the card lacks it, float16; on a CPU that multiplies faster in
    bfloat16, for models at least 64 wide, bfloat16; float32 elsewhere.
    """
    if name != "auto":
        return name
    if device.type == "cuda":
        has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return "bfloat16" if has_bfloat16 else "float16"
    if device.type == "cpu" and n_embd >= 64 and cpu_prefers_bfloat16():
        return "bfloat16"
    return "float32"


def pick_sampling_dtype(name, device, parameters):
    """
    The name of the type that a model's weights are cast to before sampling. auto: for a small
    model float32, since its time does not go into reading the weights, and for a larger one what
    pick_dtype says. On a CPU the two are equally fast at about 6 M parameters.
    """
    if name == "auto" and parameters < 6e6:
        return "float32"
    return pick_dtype(name, device, n_embd=1024)


@functools.cache
def cpu_prefers_bfloat16():
    """
    Does this CPU multiply matrices clearly faster in bfloat16 than in float32? Its instructions do
    not tell: with AVX512-BF16, some CPUs are twice as fast and others half as fast.
    """
    return matmul_seconds(torch.float32) > 1.2 * matmul_seconds(torch.bfloat16)


def matmul_seconds(dtype):
    """The time of a small layer's matrix product on the CPU, the best of at most ten in 50 ms."""
    x, weight = torch.ones(1024, 256, dtype=dtype), torch.ones(256, 256, dtype=dtype)
    times = []
    while len(times) < 2 or len(times) < 10 and sum(times) < 0.05:
        began = time.perf_counter()
        x @ weight
        times.append(time.perf_counter() - began)
    return min(times)


def pick_compile(setting, device, flops):
    """
    Whether to compile the model for a run of so many FLOPs. auto: where a compiler is there, for
    runs long enough to win back what compiling takes, half a minute to a minute. That is after
    about ten minutes of two CPU cores. Where no compiler is there, True becomes False with a line.
    """
    if device.type == "cuda":
        # Windows has no Triton
        possible, worth = importlib.util.find_spec("triton") is not None, flops > 1e15
    elif device.type == "cpu":
        has_headers = Path(sysconfig.get_path("include"), "Python.h").exists()
        possible, worth = has_headers and bool(shutil.which("g++")), flops > 3e14
    else:
        possible, worth = True, False
    if setting is True and not possible:
        say(f"compile=True: on {device.type} torch.compile needs "
            f"{'Triton' if device.type == 'cuda' else 'g++ and the headers of Python'}, which "
            f"this machine lacks; it runs uncompiled")
    return possible and (worth if setting == "auto" else setting)


def autocast(device, dtype):
    """A context in which matrices are multiplied in the type that is called dtype."""
    return torch.autocast(device.type, getattr(torch, dtype), enabled=dtype != "float32")


@contextlib.contextmanager
def process_group(device, backend="auto"):
    """
    Belong to torchrun's group of processes during a with block; a process alone has nothing to do.

    A process that fails says why and leaves at once. Leaving in good order would wait for the
    others, which wait for it; torchrun ends them.
    """
    if WORLD == 1:
        yield
        return
    if backend == "auto":
        backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend)
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        os._exit(2)
    except KeyboardInterrupt:
        # torchrun has told it to end, since another process failed
        os._exit(130)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        sys.stderr.flush()
        os._exit(1)
    dist.destroy_process_group()


def training_memory(model, cfg, device):
    """
    About how many bytes a training step takes at its peak, by arithmetic: for the models of
    BLOCKS 0.80 to 1.17 of what their tensors take when they are counted. cfg is the run's
    TrainConfig with its dtype decided; the model may be on the meta device.
    """
    N, V, C = cfg.batch_size * cfg.block_size, cfg.vocab_size, cfg.n_embd
    half = cfg.dtype != "float32"
    width = 2 if half else 4
    # Weights and gradients, AdamW's two averages, and under autocast a copy of the weights
    held = (4 + 4 + 8 + 2 * half) * model.num_params()
    # Kept for the backward pass, for each token. A Linear keeps what it reads, and what it writes
    # is kept by what comes next. In float32 those that read the same share it, which makes up for
    # what RMSNorm keeps; under autocast each has a copy of its own.
    kept = 0
    for module in model.transformer.h.modules():
        if isinstance(module, nn.Linear):
            kept += width * (module.in_features + module.out_features)
        elif isinstance(module, nn.LayerNorm):
            kept += (4 - width) * C                                    # of the stream, in float32
        elif isinstance(module, nn.RMSNorm) and half:
            kept += 3 * width * module.weight.numel()
        elif isinstance(module, BankOfValues):
            kept += 4 * module.table.size(1)
        elif isinstance(module, Attention):
            # attend() keeps a (T, T) matrix, on a CPU half of it, where no fused kernel is used
            equal = module.c_q.out_features == module.c_proj.in_features
            if not (equal and cfg.block_size > 256 or half and device.type == "cuda"):
                share = 0.5 if device.type == "cpu" else 1
                kept += (4 + 2 * half) * module.n_head * cfg.block_size * share
    # The loss: all logits four times, or those of 512 rows and the gradients by x and the head
    logits = 16 * N * V
    if V >= 8 * C:
        logits = (4 + 4 * half) * (512 + C) * V + 4 * N * C
    return int(held + N * kept + logits)


def return_large_tensors():
    """
    Let glibc give a tensor of 10 MB and more back to Linux as soon as it is freed. By itself it
    keeps the memory, in gaps into which the next aligned tensor does not fit: a dva step at 124M
    and batch 4 then peaks at 4.3 GB instead of 3.0. The fresh pages take a twentieth of the step,
    and several times as much where tensors of 1 MB are given back, too.
    """
    mallopt = sys.platform == "linux" and getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        mallopt(M_MMAP_THRESHOLD, 10**7)


def memory_of(device):
    """The bytes of memory of a GPU, or of this machine; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def check_memory(model, cfg, device):
    """
    The bytes that training_memory() says, with a warning where they are more than the device has.
    Raises UserError where its memory cannot even hold the weights.
    """
    needed, present = training_memory(model, cfg, device), memory_of(device) or math.inf
    count = model.num_params()
    have = f"{device} has {present / 1e9:.1f} GB of memory"
    if 4 * count > present:
        fail(f"n_layer={cfg.n_layer}, n_embd={cfg.n_embd}, vocab_size={cfg.vocab_size}: these "
             f"{count / 1e6:,.0f} M parameters take {4 * count / 1e9:,.1f} GB, and {have}: make "
             f"the model smaller")
    if 16 * count > present:
        say(f"warning: to train {count / 1e6:,.0f} M parameters takes at least "
            f"{16 * count / 1e9:,.1f} GB, and {have}: lower --n_layer={cfg.n_layer} or "
            f"--n_embd={cfg.n_embd}")
    elif needed > present:
        say(f"warning: a step takes about {needed / 1e9:,.1f} GB, and {have}: lower "
            f"--batch_size={cfg.batch_size}, and raise --gradient_accumulation_steps as much to "
            f"train on as many tokens per step")
    return needed


@contextlib.contextmanager
def naming_memory(hint):
    """A with block in which running out of memory raises UserError, with the hint."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # On a CPU torch has no class of its own for it, but the same words
        asked = re.search(r"\w+ to allocate [\d.]+ \w+", str(error))
        if not asked and not isinstance(error, MemoryError):
            raise
        fail(f"out of memory ({asked[0] if asked else error}): {hint}")


def from_rank_0(value):
    """What rank 0 has for value, a picklable object, in all processes."""
    held = [value]
    if WORLD > 1:
        dist.broadcast_object_list(held)
    return held[0]


def check_equal(value, hint):
    """
    Raise UserError where a process has another value than rank 0. Rank 0 says so for all, and
    torchrun ends the others, which wait for it by then.
    """
    values = [value] * WORLD
    if WORLD > 1:
        dist.all_gather_object(values, value)
    for rank, other in enumerate(values):
        if RANK == 0 and other != value:
            fail(f"process {rank} has {other}, and process 0 has {value}: {hint}")


def check_replicas(model):
    """Raise UserError where a process has other weights, by a bit, than rank 0."""
    if WORLD > 1:
        digest = hashlib.sha256()
        for p in model.parameters():
            digest.update(p.detach().cpu().numpy().tobytes())
        check_equal(digest.hexdigest()[:16], "this is a hash of the weights, which have drifted "
                    "apart; the processes' machines compute differently: use equal ones")


class Stop:
    """
    A with block in which the first Ctrl-C or SIGTERM is kept in `signal`, for the run to end in
    good order. A second Ctrl-C raises KeyboardInterrupt.
    """

    def __init__(self):
        self.signal = 0

    def __enter__(self):
        self.before = {number: signal.signal(number, self.keep)
                       for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, kind, error, traceback):
        for number, handler in self.before.items():
            signal.signal(number, handler)
        if self.signal and isinstance(error, Exception) and not isinstance(error, UserError):
            # Ctrl-C reaches the C++ compiler, too, and a compilation that it ended fails
            raise KeyboardInterrupt from None

    def keep(self, number, frame):
        self.signal = number
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if RANK == 0:
            print("\nfinishing the step; Ctrl-C again stops at once", file=sys.stderr, flush=True)
