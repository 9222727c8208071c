"""
The machine: device, dtype, compilation, the group of processes and the signals that stop a run.
"""
import contextlib
import hashlib
import importlib.util
import math
import os
import re
import shutil
import signal
import sys
import sysconfig
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from nanodva.errors import UserError, fail

# torchrun tells each process its number and how many there are
RANK = int(os.environ.get("RANK", 0))
WORLD = int(os.environ.get("WORLD_SIZE", 1))

DTYPES = ("float32", "bfloat16", "float16")

# Ctrl-C, a scheduler's end, a closed terminal, and Slurm's warning; Windows lacks two of them
STOPPING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
            if hasattr(signal, name)]

CPUINFO = Path("/proc/cpuinfo")


def say(text):
    """Print a line, once for all processes, above the bars; silently if nobody can read it."""
    if RANK > 0:
        return
    try:
        with tqdm.external_write_mode():
            print(text, flush=True)
    except OSError:
        # The reader of the pipe, such as head, has ended, or the terminal was closed
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def bar(*args, **options):
    """A bar of tqdm's, once for all processes, if standard error is a terminal."""
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
    present = []
    if torch.cuda.is_available():
        present = ["cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
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
    on CUDA bfloat16 or, if the card lacks it, float16; on a CPU that multiplies faster in
    bfloat16, for models at least 64 wide, bfloat16; otherwise float32.
    """
    if name != "auto":
        return name
    if device.type == "cuda":
        has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return "bfloat16" if has_bfloat16 else "float16"
    # The CPU's instructions decide, not a timing, so the answer is the same at every start. With
    # AMX, and on AMD with AVX512-BF16, a step took 0.50 to 0.88 of its time in float32; on an Intel
    # Xeon with AVX512-BF16 alone 0.78 to 1.45. Without either a product takes 5 (AVX-512) to 100
    # times as long (AVX2).
    flags = CPUINFO.read_text() if CPUINFO.exists() else ""
    is_faster = "amx_bf16" in flags or "AuthenticAMD" in flags and "avx512_bf16" in flags
    return "bfloat16" if device.type == "cpu" and n_embd >= 64 and is_faster else "float32"


def pick_sampling_dtype(name, device, parameters):
    """
    The name of the type that a model's weights are cast to before sampling. auto: for less than
    6 M parameters float32, which is as fast there on a CPU, and otherwise what pick_dtype says.
    """
    if name == "auto" and parameters < 6e6:
        return "float32"
    return pick_dtype(name, device, n_embd=1024)


def pick_compile(setting, device, flops):
    """
    Whether to compile the model for a run of so many FLOPs. auto: with a compiler, for runs that
    win back the minute of compiling, on two CPU cores those of about ten minutes.
    """
    if setting != "auto":
        return setting
    if device.type == "cuda":
        # Windows has no Triton
        return flops > 1e15 and importlib.util.find_spec("triton") is not None
    has_headers = Path(sysconfig.get_path("include"), "Python.h").exists()
    return device.type == "cpu" and flops > 3e14 and has_headers and bool(shutil.which("g++"))


def compiled(model, trial, setting, stop):
    """
    The compiled model, once trial(model) has used it. If compiling fails in any process, the model
    itself with a line, or UserError if the setting is True and not auto.
    """
    attempt, reason = torch.compile(model, dynamic=False), ""
    try:
        trial(attempt)
    except Exception as error:
        # A mistake in the model's own code shows itself here, with its traceback
        trial(model)
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    reason = max(from_all(reason))
    # Ctrl-C reaches the C++ compiler, too
    if reason and not stop.signal:
        if setting is True:
            fail(f"compile=True: torch.compile fails here; --compile=False goes on without: "
                 f"{reason}")
        say(f"torch.compile fails here, so the model runs uncompiled: {reason}")
    return model if reason else attempt


def autocast(device, dtype):
    """torch.autocast for a dtype given by name."""
    return torch.autocast(device.type, getattr(torch, dtype), enabled=dtype != "float32")


def peak_memory(device):
    """The most GB that tensors took on a GPU, or this process on a CPU; 0 on Windows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    if sys.platform == "win32":
        return 0.0
    import resource
    # macOS counts in bytes, Linux in kB
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def check_memory(count, device):
    """Raise UserError if the device's memory is too small for so many parameters alone."""
    present = math.inf
    if device.type == "cuda":
        present = torch.cuda.get_device_properties(device).total_memory
    elif "SC_PHYS_PAGES" in getattr(os, "sysconf_names", ()):
        present = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if 4 * count > present:
        fail(f"{count / 1e6:,.0f} M parameters take {4 * count / 1e9:,.1f} GB, and {device} has "
             f"{present / 1e9:.1f} GB of memory: lower --n_layer, --n_embd or the vocabulary")


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


@contextlib.contextmanager
def process_group(device, backend="auto"):
    """
    A with block in torchrun's group of processes; a process alone has nothing to do. A failing
    process prints the reason and exits immediately: an orderly shutdown would wait for the others,
    which wait for it, and which torchrun terminates.
    """
    if WORLD == 1:
        yield
        return
    if backend == "auto":
        backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend)
    try:
        yield
    except BaseException as error:
        if isinstance(error, UserError):
            print(f"error: {error}", file=sys.stderr)
        elif not isinstance(error, KeyboardInterrupt):
            sys.excepthook(*sys.exc_info())
        sys.stderr.flush()
        os._exit(2 if isinstance(error, UserError) else 1)
    dist.destroy_process_group()


def from_all(value):
    """The values of all processes, picklable objects, as a list."""
    values = [value] * WORLD
    if WORLD > 1:
        dist.all_gather_object(values, value)
    return values


def check_equal(value, hint):
    """
    Raise UserError if a process has another value than rank 0. Only rank 0 reports it; torchrun
    then terminates the others.
    """
    for rank, other in enumerate(from_all(value)):
        if RANK == 0 and other != value:
            fail(f"process {rank} has {other}, and process 0 has {value}: {hint}")


def check_replicas(model):
    """Raise UserError if a process has other weights, by a bit, than rank 0."""
    if WORLD > 1:
        digest = hashlib.sha256()
        for p in model.parameters():
            digest.update(p.detach().cpu().numpy().tobytes())
        check_equal(digest.hexdigest()[:16], "this is a hash of the weights, which have drifted "
                    "apart; the processes' machines compute differently: use equal ones")


class Stop:
    """
    A with block that keeps the first of the STOPPING signals in `signal`, for the run to end in
    good order; Ctrl-C after it raises KeyboardInterrupt. A signal that the program's parent has
    set to be ignored, as nohup does, stays ignored.
    """

    def __init__(self):
        self.signal = 0

    def __enter__(self):
        self.before = {number: signal.signal(number, self.keep) for number in STOPPING
                       if signal.getsignal(number) != signal.SIG_IGN}
        return self

    def __exit__(self, kind, error, traceback):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def keep(self, number, frame):
        self.signal = self.signal or number
        if signal.SIGINT in self.before:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if RANK == 0:
            # The terminal may have been closed, or the signal may interrupt another print()
            with contextlib.suppress(OSError, RuntimeError):
                print("\nfinishing the step; Ctrl-C again stops at once", file=sys.stderr,
                      flush=True)

    def agreed(self, step):
        """
        Whether any process has got a signal. All have to ask at the same step and get the same
        answer. Asking makes a GPU wait, so it happens there at every tenth step only.
        """
        if WORLD == 1:
            return self.signal > 0
        is_nccl = dist.get_backend() == "nccl"
        if is_nccl and step % 10:
            return False
        stops = torch.tensor(float(self.signal > 0), device="cuda" if is_nccl else "cpu")
        dist.all_reduce(stops)
        return stops.item() > 0
