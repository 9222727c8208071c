"""
Errors of one line, and files that are written whole or not at all, by one process.

A script imports this module before torch: it says in one line which packages this Python lacks.
"""
import errno
import os
import platform
import signal
import sys
import time
from contextlib import contextmanager
from pathlib import Path

# The lock files that this process holds
HELD = set()


class UserError(ValueError):
    """Something that the user can put right: the message names the value, the options, the fix."""


def fail(message):
    """Raise UserError with the message on one line."""
    raise UserError(" ".join(line.strip() for line in str(message).splitlines()))


def run_script(main):
    """
    Run main(). A UserError becomes one line and exit status 2, Ctrl-C status 130. Any other error
    is a mistake in the code and keeps its traceback.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # A closed one is None, in which nobody can write or read
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))
    for stream in (sys.stdout, sys.stderr):
        # A console shows what it can; a file or a pipe is UTF-8, on Windows, too
        stream.reconfigure(encoding=stream.encoding if stream.isatty() else "utf-8",
                           errors="replace")
    try:
        try:
            return main()
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt:
        message, status = "stopped at once", 130
    except UserError as error:
        message, status = f"error: {error}", 2
    except OSError as error:
        # Those of print(), which name no file
        if error.filename or error.errno not in (errno.EPIPE, errno.ENOSPC, errno.EDQUOT):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if error.errno == errno.EPIPE:
            # The reader of a pipe, such as head, has seen enough
            raise SystemExit(141) from None
        message, status = f"error: cannot write standard output: {error.strerror}", 2
    print(message, file=sys.stderr)
    raise SystemExit(status)


# ---- files of the user ---------------------------------------------------------------------------

@contextmanager
def naming_file(action, path, fix):
    """
    A with block that does `action`, as "read", with the user's file or folder `path`. What the disk
    refuses becomes a UserError that ends with `fix`; an OSError about any other file passes.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        # torch.save puts an error of its own around the disk's
        reason = error if isinstance(error, OSError) else error.__context__
        # An open file's error names no file; others name path, its .tmp or a folder above it
        named = getattr(reason, "filename", None) or ""
        if not isinstance(reason, OSError) or not f"{path}.tmp".startswith(str(named)):
            raise
        fail(f"cannot {action} {path}: {reason.strerror or reason}; {fix}")


@contextmanager
def replacing(path):
    """
    A file to write bytes to that replaces `path` once it is complete and on the disk. Whatever
    happens, `path` is all of the old file or all of the new one.
    """
    aside = Path(f"{path}.tmp")
    fix = "what it held before is untouched" if Path(path).exists() else "name another place"
    with naming_file("write", path, fix):
        file = open(aside, "wb")
        try:
            with file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise


def check_new(name, path, suffix):
    """
    Raise UserError if the setting `name` gives a path to write that is a folder or has another
    suffix: a checkpoint would be lost.
    """
    path = Path(path)
    if path.is_dir() or path.exists() and path.suffix != suffix:
        fail(f"{name}={str(path)!r} is there and is no {suffix}: name a new file, {path}{suffix}")


@contextmanager
def only_writer(folder, patience=0, setting="out_dir"):
    """
    Make the folder and hold its lock, which the system frees however this process ends; a process
    may hold it twice. Raises UserError if another keeps it for `patience` seconds; `setting` is the
    option that names the folder.
    """
    path, fix = Path(folder, "lock").absolute(), f"give another folder as --{setting}"
    if path in HELD:
        yield
        return
    with naming_file("write", path, fix):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+", encoding="utf-8", errors="replace")
    with file:
        end = time.monotonic() + patience
        while not try_lock(file):
            if time.monotonic() > end:
                file.seek(0)
                fail(f"{file.read() or 'another process'} writes in {folder} and holds {path}: "
                     f"wait for it, stop it, or {fix}")
            time.sleep(0.1)
        with naming_file("write", path, fix):
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
    Whether this process alone now holds the open file's lock. If the disk cannot lock, as some
    network disks, one line says so and the answer is yes.
    """
    try:
        import fcntl
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (OSError, ImportError) as error:
        # Windows has no fcntl
        reason = getattr(error, "strerror", error)
        print(f"{file.name} cannot be locked ({reason}): make sure that no other process writes in "
              f"this folder", file=sys.stderr)
    return True
