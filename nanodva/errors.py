"""
Errors of one line, and files that are written whole or not at all, by one process.
"""
import errno
import os
import platform
import signal
import sys
import time
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:
    # Windows
    fcntl = None

# The lock files that this process holds
HELD = set()


class UserError(ValueError):
    """Something that the user can put right: the message names the value, the options, the fix."""


def fail(message):
    """Raise UserError with the message on one line."""
    raise UserError(" ".join(str(message).split()))


def run_script(main):
    """
    Run a script's main(). What the user can put right, a full disk included, becomes one line and
    exit status 2, and Ctrl-C status 130.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for stream in (sys.stdout, sys.stderr):
        # A console shows what it can. A file or a pipe, which on Windows would be in an encoding
        # without most characters, is UTF-8.
        stream.reconfigure(encoding=stream.encoding if stream.isatty() else "utf-8",
                           errors="replace")
    try:
        main()
        return
    except KeyboardInterrupt:
        message, status = "stopped at once", 130
    except UserError as error:
        message, status = f"error: {error}", 2
    except BrokenPipeError:
        # The reader of a pipe, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None
    except OSError as error:
        message, status = f"error: {error.filename or 'a file'}: {error.strerror or error}", 2
    print(message, file=sys.stderr)
    raise SystemExit(status)


def check_folder(name, path):
    """Raise UserError where the Path of the setting `name` is a file, or cannot be there."""
    try:
        found = next((part for part in (path, *path.parents) if part.exists()), None)
    except OSError as error:
        fail(f"{name}={path}: {error.strerror}; give another folder")
    if found and not found.is_dir():
        hint = f": did you mean --{name}={found.parent}?" if found.suffix == ".pt" else ""
        fail(f"{name}={path}: {found} is a file, and a folder is wanted{hint}")


def check_new(name, path, suffix):
    """
    Raise UserError where the setting `name` gives a path to write that is a folder, or a file with
    another suffix than what is written has: a checkpoint would be lost.
    """
    path = Path(path)
    if path.is_dir() or path.exists() and path.suffix != suffix:
        fail(f"{name}={str(path)!r} is there and is no {suffix}: name a new file, as in "
             f"{path}{suffix}")


@contextmanager
def replacing(path):
    """
    A file to write to, open for bytes, that takes the place of `path` once it is complete and on
    the disk. Whatever happens, `path` is all of the old file or all of the new one.
    """
    aside = Path(f"{path}.tmp")
    try:
        file = open(aside, "wb")
    except OSError as error:
        fail(f"cannot write {path}: {error.strerror}; name another place")
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


@contextmanager
def only_writer(folder, patience=0, setting="out_dir"):
    """
    Make the folder and hold the lock in it, which the system frees when this process ends, in
    whatever way; a process may hold it twice. Raises UserError if another process keeps it for
    `patience` seconds; `setting` names the option with which to choose another folder.
    """
    path = Path(folder, "lock").absolute()
    if path in HELD:
        yield
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+")
    except OSError as error:
        fail(f"cannot write in {folder}: {error.strerror}; give another folder as --{setting}")
    with file:
        end = time.monotonic() + patience
        while not try_lock(file):
            if time.monotonic() > end:
                file.seek(0)
                fail(f"{file.read() or 'another process'} writes in {folder} and holds {path}: "
                     f"wait for it, stop it, or give another folder as --{setting}")
            time.sleep(0.1)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
        HELD.add(path)
        try:
            yield
        finally:
            HELD.remove(path)


def try_lock(file):
    """
    Whether this process is now the only one that holds the open file's lock. Where the disk cannot
    lock, as some network disks, one line says so and the answer is yes.
    """
    try:
        if fcntl is None:
            raise OSError(errno.ENOSYS, "Windows has no flock")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        print(f"{file.name} cannot be locked ({error.strerror}): make sure that no other process "
              f"writes in this folder", file=sys.stderr)
    return True
