"""Programs of strangers, run where they can touch nothing.

A program runs in namespaces of its own (mount, process, network, IPC, host name; user too, unless
root starts it), in a root directory that holds the system's libraries and Python read-only and
16 MB of memory to write into, without capabilities, under limits of time, memory, processes, open
files and output. Where the system offers no such namespaces nothing is run at all.
"""

import functools
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

NOBODY = 65534
TOOLS = ("unshare", "mount", "umount", "pivot_root", "setpriv", "prlimit")
OUTPUT = 2**20
"""bytes that a program may write to its output, or to a file"""
LONGEST = 2**16
"""bytes of a program; Linux takes twice as many as one argument"""
PROCESSES = 16
MEMORY = 2**28
"""bytes of address space of each process"""

# Runs as the first process of the namespaces; $1 is an empty directory, then the directories that
# are shown, then "--", then what runs without the right to any of this. What is not bound below is
# not there.
SETUP = r"""
set -e
root=$1; shift
mount --make-rprivate /
mount -t tmpfs -o size=16m,nosuid,nodev,mode=755 none "$root"
cd "$root"
mkdir -p proc tmp dev old
while [ "$1" != "--" ]; do
    if [ -L "$1" ]; then
        ln -s "$(readlink "$1")" ".$1"
    else
        mkdir -p ".$1"
        mount --rbind "$1" ".$1"
        mount -o remount,bind,ro,nosuid ".$1"
        # that was the topmost; what was mounted below it came along as it was
        while read -r _ _ _ _ point _; do
            case "$point" in
                "$(pwd -P)$1"/*) mount -o remount,bind,ro,nosuid "$point" ;;
            esac
        done < /proc/self/mountinfo
    fi
    shift
done
shift
mount -t proc -o nosuid,nodev,noexec proc proc
touch dev/null
mount --bind /dev/null dev/null
pivot_root . old
umount -l /old
mount -t tmpfs -o size=16m,nosuid,nodev,mode=1777 none /tmp
mount -o remount,ro /
cd /tmp
exec "$@"
"""


class Ran(NamedTuple):
    """How a program ended."""

    output: str  # what it wrote to standard output and error, at most `OUTPUT` bytes
    code: int | None  # exit status, minus the signal that ended it; None: the time was up


def shown() -> list[str]:
    """The directories that a Python program needs: the system's libraries and Python's own."""
    wanted = ["/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", sys.base_prefix]
    real = [path for path in dict.fromkeys(wanted) if os.path.lexists(path)]
    return [p for p in real if p == "/usr" or not p.startswith("/usr/")]


def missing() -> str | None:
    """Why no program can be run here; None if one can. Found out once, by running one."""
    return _missing()


@functools.cache
def _missing() -> str | None:
    lacking = [tool for tool in TOOLS if shutil.which(tool, path=_PATH) is None]
    if sys.platform != "linux" or lacking:
        return f"it needs Linux with {', '.join(lacking or TOOLS)}"
    ran = _run("print(6 * 7)", 20.0)
    if ran.code == 0 and ran.output.strip() == "42":
        return None
    said = ran.output.strip().splitlines() or ["no answer"]
    return f"namespaces are not to be had ({said[-1]})"


def run(program: str, seconds: float = 5.0) -> Ran:
    """Run a Python program without arguments or input, `seconds` of wall clock at most.

    Raises:
      ValueError: the system offers no isolation; the program is not run.
    """
    why = missing()
    if why is not None:
        raise ValueError(f"Programs are not run here: {why}.")
    return _run(program, seconds)


def passes(solution: str, tests: str, seconds: float = 5.0) -> bool:
    """Whether the tests (Python statements, such as asserts) come to their end after the solution.

    To the end, which a word drawn for this call says: a solution that leaves before it, with
    whatever exit status, has failed. Deviation from what one may wish: the word stands in the
    program, and a solution that reads its own command line can print it.
    """
    word = secrets.token_hex(16)
    program = f"{solution}\n{tests}\nprint({word!r})\n"
    if "\0" in program or len(program.encode()) > LONGEST:  # no command line takes it
        return False
    ran = run(program, seconds)
    return ran.code == 0 and ran.output.rstrip().endswith(word)


_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"


def _run(program: str, seconds: float) -> Ran:
    is_root = os.geteuid() == 0
    python = str(Path(sys.base_prefix, "bin", f"python3.{sys.version_info.minor}"))
    # not a `preexec_fn`: that would run Python in a fork of this process and of JAX's threads
    command = ["prlimit", f"--cpu={int(seconds) + 1}", f"--fsize={OUTPUT}", "--nofile=64"]
    command += ["--core=0", "unshare", *([] if is_root else ["--user", "--map-root-user"])]
    command += [
        "--mount",
        "--pid",
        "--fork",
        "--net",
        "--ipc",
        "--uts",
        "--kill-child=SIGKILL",
        "sh",
        "-c",
        SETUP,
        "sh",
    ]
    drop = ["setpriv", "--no-new-privs", "--bounding-set=-all", "--inh-caps=-all"]
    # of root's processes the kernel counts none, so a fork bomb must be somebody's
    drop += [f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"] if is_root else []
    limits = [*drop, "prlimit", f"--nproc={PROCESSES}", f"--as={MEMORY}"]
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as output:
        os.chmod(folder, 0o755)
        command += [folder, *shown(), "--", *limits, python, "-I", "-c", program]
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={"PATH": _PATH},
            cwd="/",
            start_new_session=True,
        )
        try:
            code = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            # the first process of the namespace dies with its parent, and all others with it
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        output.seek(0)
        return Ran(output.read(OUTPUT).decode(errors="replace"), code)
