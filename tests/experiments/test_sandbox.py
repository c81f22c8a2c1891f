"""Hostile programs end within their limits and touch nothing; correct solutions pass."""

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from experiments import sandbox

isolated = pytest.mark.skipif(
    sandbox.missing() is not None, reason=f"no sandbox here: {sandbox.missing()}"
)
SECONDS = 3.0

HOSTILE = {
    "fork bomb": "import os\nwhile True:\n    os.fork()",
    "fork bomb that ignores errors": """
import os
while True:
    try:
        os.fork()
    except OSError:
        pass""",
    "memory bomb": "x = []\nwhile True:\n    x.append(bytearray(10**7))",
    "infinite loop": "while True: pass",
    "loop that ignores signals": """
import signal
for s in range(1, 65):
    try:
        signal.signal(s, signal.SIG_IGN)
    except (OSError, ValueError):
        pass
while True: pass""",
    "sleep": "import time\ntime.sleep(1000)",
    "giant output": "while True: print('x' * 10**6)",
    "giant file": "f = open('/tmp/x', 'wb')\nwhile True: f.write(b'x' * 10**6)",
    "kill everything": "import os\nos.kill(-1, 9)",
    "kill the parent": "import os\nos.kill(os.getppid(), 9)\nos.kill(1, 9)",
    "leave early": "import os\nos._exit(0)",
    "leave early, politely": "raise SystemExit(0)",
    "recursion": "def f(): f()\nimport sys\nsys.setrecursionlimit(10**9)\nf()",
    "children left behind": """
import os, time
if os.fork() == 0:
    os.setsid()
    time.sleep(999)""",
}
FORBIDDEN = {
    "write beside": "open({beside!r}, 'w').write('x')",
    "write to the system": "open('/usr/x', 'w')",
    "write to the root": "open('/x', 'w')",
    "read beside": "open({beside_there!r}).read()",
    "read the passwords": "open('/etc/passwd').read()",
    "network": "import socket\nsocket.create_connection(('127.0.0.1', {port}), 1)",
    "network by name": "import socket\nsocket.getaddrinfo('example.org', 80)",
    "mount": "import subprocess\nsubprocess.run(['mount', '-t', 'tmpfs', 'x', '/tmp'], check=True)",
    "escape the root": "import os\nos.mkdir('/tmp/a')\nos.chroot('/tmp/a')",
    "become somebody": "import os\nos.setuid(1)",
    "new namespaces": "import subprocess\nsubprocess.run(['unshare', '-Ur', 'true'], check=True)\n"
    "open('/usr/x', 'w')",
    "more memory": "import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
    "see other processes": "import os\nassert [p for p in os.listdir('/proc') if p.isdigit()] != "
    "[str(os.getpid())]",
    "host name": "import socket\nsocket.sethostname('x')",
    "devices": "open('/dev/mem', 'rb')",
    "environment": "import os\nprint(os.environ['HOME'])",
}


def sleepers():
    """Processes whose command line holds a line of the hostile programs."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has just ended
            if b"time.sleep(" in path.read_bytes() or b"while True" in path.read_bytes():
                found.add(path)
    return found


@isolated
def test_hostile_programs_end_and_nothing_of_them_is_left():
    """Two at a time; each ends within its limit, fails its tests, and leaves no process."""
    before = sleepers()

    def one(name):
        began = time.monotonic()
        passed = sandbox.passes(HOSTILE[name], "assert True", SECONDS)
        return name, passed, time.monotonic() - began

    with ThreadPoolExecutor(2) as pool:
        rows = list(pool.map(one, HOSTILE))
    found = {name: passed for name, passed, _ in rows}
    # what leaves a child behind, or kills all others, has itself come to its end
    may_pass = {"children left behind", "kill everything", "kill the parent"}
    assert {name for name, passed in found.items() if passed} <= may_pass
    # starting, ending and clearing up take their time on a busy machine
    assert max(seconds for _, _, seconds in rows) < SECONDS + 10
    assert sleepers() <= before


@isolated
@pytest.mark.parametrize("name", FORBIDDEN)
def test_what_is_forbidden_raises(name, tmp_path):
    """The program is told by an error, and the world outside stays as it is."""
    import socket

    beside = tmp_path / "new"
    there = tmp_path / "there"
    there.write_text("secret")
    os.chmod(tmp_path, 0o777)
    with socket.create_server(("127.0.0.1", 0)) as server:
        names = {"beside": str(beside), "beside_there": str(there)}
        names |= {"port": server.getsockname()[1]}
        ran = sandbox.run(FORBIDDEN[name].format(**names), 20.0)
    assert ran.code not in (0, None)
    assert "error" in ran.output.lower()
    assert not beside.exists()
    assert not os.path.exists("/x")
    assert not os.path.exists("/usr/x")


@isolated
def test_output_is_cut():
    ran = sandbox.run("while True: print('x' * 10**5)", 20.0)
    assert ran.code != 0
    assert 10**5 < len(ran.output) <= sandbox.OUTPUT


@isolated
def test_what_is_too_long_for_a_command_line_fails():
    assert not sandbox.passes("x = 1\n" * 10**5, "assert True")
    assert sandbox.passes("x = 1\n" * 10**4, "assert x == 1")


@isolated
def test_why_nothing_is_run_where_namespaces_cannot_be_made(monkeypatch):
    monkeypatch.setattr(sandbox, "SETUP", "echo no such luck; exit 3")
    assert sandbox._missing.__wrapped__() == "namespaces are not to be had (no such luck)"


def test_why_nothing_is_run_without_the_tools(monkeypatch):
    monkeypatch.setattr(sandbox, "_PATH", "/nowhere")
    assert "it needs Linux with unshare" in str(sandbox._missing.__wrapped__())


@isolated
def test_a_correct_solution_passes_and_a_wrong_one_does_not():
    tests = "assert add(2, 3) == 5\nassert add(-1, 1) == 0"
    assert sandbox.passes("import math\ndef add(a, b):\n    return a + b", tests, 20.0)
    assert not sandbox.passes("def add(a, b):\n    return a - b", tests, 20.0)
    assert not sandbox.passes("def add(a, b:", tests, 20.0)


def test_without_isolation_nothing_is_run(monkeypatch):
    monkeypatch.setattr(sandbox, "missing", lambda: "namespaces are not to be had")
    monkeypatch.setattr(sandbox, "_run", lambda *_: pytest.fail("it was run"))
    with pytest.raises(ValueError, match="not run here"):
        sandbox.passes("print(1)", "assert True")


BELOW = """
import sys
from experiments import sandbox
own = sandbox.shown()
sandbox.shown = lambda: [*own, sys.argv[1]]
print(sandbox.run(f"print(open('{sys.argv[1]}/below/x').read())").output)
print(sandbox.run(f"open('{sys.argv[1]}/below/y', 'w')").output)
"""


@isolated
@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a file system for the test")
def test_what_is_mounted_below_a_shown_directory_is_read_only_too():
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:  # /tmp is the program's own
        os.chmod(folder, 0o755)
        mounted = 'mkdir "$1/below" && mount -t tmpfs -o mode=777 none "$1/below" && '
        mounted += 'echo seen > "$1/below/x" && exec "$0" -c "$2" "$1"'
        command = ["unshare", "--mount", "sh", "-c", mounted, sys.executable, folder, BELOW]
        ran = subprocess.run(command, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
        assert ran.stdout.startswith("seen\n")
        assert "Read-only file system" in ran.stdout
