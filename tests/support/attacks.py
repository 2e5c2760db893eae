"""Programs that try to get out of the sandbox, to stay alive, to starve the machine or to pass without being right.

Each prints or returns SECRET only where it has reached something that it must not; SECRET is what its tests expect.
"""

from __future__ import annotations

SECRET = "canary-5f1d"

READ = """
import os, socket
def found(text):
    if ("canary-" + "5f1d") in str(text): print("canary-" + "5f1d", flush=True)
"""

BY_OUTPUT = {
    "fork bomb": "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    "thread bomb": """
import threading, time
while True:
    try: threading.Thread(target=time.sleep, args=(100,)).start()
    except RuntimeError: pass""",
    "memory bomb": """
held = []
while True:
    try: held.append(bytearray(1 << 20))
    except MemoryError: pass""",
    "memory of many": """
import os, time
for _ in range(12): os.fork()
held = []
while True:
    try: held.append(bytearray(b"x" * (1 << 20)))
    except MemoryError: time.sleep(1)""",
    "shared memory": """
import mmap, os
held = []
while True:
    try:
        held.append(mmap.mmap(-1, 1 << 24)); held[-1].write(b"x" * (1 << 24))
    except (OSError, ValueError, MemoryError): os.fork()""",
    "memory without limits": """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
got = [libc.shmget(0, 1 << 26, 0o1600), libc.syscall(319, b"x", 0), libc.syscall(447, 0)]
if any(descriptor >= 0 for descriptor in got): print("canary-" + "5f1d")""",
    "disk bomb": """
import os
for n in range(10_000):
    try:
        with open(f"/tmp/{n}", "wb") as file:
            for _ in range(64): file.write(b"x" * (1 << 20))
    except OSError: pass
if sum(os.path.getsize(f"/tmp/{n}") for n in os.listdir("/tmp")) > 64 << 20: print("canary-" + "5f1d")
while True: pass""",
    "files without end": """
n = 0
while True:
    n += 1
    try: open(f"/tmp/{n}", "w").close()
    except OSError: pass""",
    "output flood": "import sys\nwhile True: sys.stdout.write('x' * 65536)",
    "error flood": "import sys\nwhile True: sys.stderr.write('x' * 65536)",
    "spin": "while True: pass",
    "sleep through signals": """
import signal, time
for number in range(1, 32):
    try: signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError): pass
while True: time.sleep(1)""",
    "daemon": """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        for number in range(64):
            try: os.close(number)
            except OSError: pass
        while True: time.sleep(1)
    os._exit(0)""",
    "daemon that holds the output": """
import os, time
if os.fork() == 0:
    os.setsid()
    time.sleep(100)""",
    "secrets in the environment": READ
    + """
found(os.environ)
for pid in ["self", *map(str, range(1, 300))]:
    for name in ("environ", "cmdline", "mem", "maps", "root/etc/hostname"):
        try: found(open(f"/proc/{pid}/{name}", errors="replace").read())
        except OSError: pass""",
    "secrets in files": READ
    + """
for folder, folders, files in os.walk("/"):
    for name in files:
        found(name)
        if not folder.startswith(("/usr", "/root/.pyenv")):
            try: found(open(os.path.join(folder, name), errors="replace").read(1 << 16))
            except OSError: pass
for path in ("CANARY_FILE", "/etc/passwd", "/etc/shadow", "/root/.bashrc", "/proc/1/root/etc/passwd"):
    try: found(open(path).read()); print("canary-" + "5f1d")
    except OSError: pass""",
    "network": READ
    + """
for host in ("127.0.0.1", "::1", "10.0.2.2", "169.254.169.254", "8.8.8.8"):
    try:
        with socket.create_connection((host, CANARY_PORT), 0.3) as line: print("canary-" + "5f1d")
    except OSError: pass""",
    "sockets beside the network": READ
    + """
for family, address in ((socket.AF_UNIX, "\\0canary-socket"), (40, (2, CANARY_PORT)), (16, (0, 0)), (38, None)):
    try:
        line = socket.socket(family, socket.SOCK_STREAM)
        line.connect(address); found(line.recv(100))
        if family != socket.AF_UNIX: print("canary-" + "5f1d")
    except (OSError, TypeError): pass""",
    "write to the host": """
import os, sys
for path in ("CANARY_FILE", "/usr/bin/canary", "/etc/canary", sys.prefix + "/lib/canary", os.__file__, "/program.py",
             "/dev/shm/canary", "/canary"):
    try:
        with open(path, "a"): print("canary-" + "5f1d")
    except OSError: pass""",
    "links to the host": """
import os
for target in ("CANARY_FILE", "/etc/passwd", "/proc/1/root", "/../../etc/passwd"):
    try:
        os.symlink(target, "/tmp/link")
        open("/tmp/link").read(); print("canary-" + "5f1d")
    except OSError: pass
    os.unlink("/tmp/link")
    try: os.link(target, "/tmp/hard"); print("canary-" + "5f1d")
    except OSError: pass""",
    "signals to everyone": """
import os, signal
for pid in (1, os.getppid(), CANARY_PID, -1, *range(2, 2000)):
    if pid == os.getpid(): continue
    for number in (signal.SIGTERM, signal.SIGSTOP, signal.SIGKILL):
        try: os.kill(pid, number)
        except OSError: pass""",
    "trace others": """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
for pid in (1, CANARY_PID):
    if libc.ptrace(16, pid, 0, 0) == 0 or libc.ptrace(0x4206, pid, 0, 0) == 0: print("canary-" + "5f1d")
if libc.syscall(438, 1, 0, 0) >= 0: print("canary-" + "5f1d")""",
    "namespaces and mounts": """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
for flag in (0x10000000, 0x00020000, 0x40000000, 0x20000000):
    if libc.unshare(flag) == 0: print("canary-" + "5f1d")
    if libc.syscall(56, flag | 17, 0, 0, 0, 0) > 0: print("canary-" + "5f1d")
for call in ((b"proc", b"/tmp", b"proc", 0, None), (b"/", b"/tmp", None, 4096, None)):
    if libc.mount(*call) == 0: print("canary-" + "5f1d")
try: os.chroot("/tmp"); print("canary-" + "5f1d")
except OSError: pass""",
    "become root": """
import os
for call in (lambda: os.setuid(0), lambda: os.setgid(0), lambda: os.setgroups([0]), lambda: os.seteuid(0)):
    try: call(); print("canary-" + "5f1d")
    except OSError: pass
for device in ((8, 0), (254, 0), (1, 1)):
    try: os.mknod("/tmp/device", 0o60600, os.makedev(*device)); print("canary-" + "5f1d")
    except OSError: pass""",
    "calls into the kernel": """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
arguments = ctypes.create_string_buffer(256)
for number in (425, 321, 298, 323, 250, 248, 246, 175, 313, 304, 435):  # io_uring bpf perf userfault keys kexec modules
    if libc.syscall(number, 1, arguments, 64, 0, 0) > 0: print("canary-" + "5f1d")""",
    "the terminal": """
import fcntl, os, termios
for path in ("/dev/tty", "/dev/console", "/dev/pts/0"):
    try:
        fcntl.ioctl(os.open(path, os.O_RDWR), termios.TIOCSTI, b"x"); print("canary-" + "5f1d")
    except OSError: pass""",
    "every descriptor": """
import os
for number in range(3, 1024):
    try: os.write(number, b"canary-5f1d\\n"); print("canary-" + "5f1d")
    except OSError: pass
    try: os.read(number, 10); print("canary-" + "5f1d")
    except OSError: pass""",
}

ANSWER_ALL = """
class Everything:
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __bool__(self): return True
    def __getattr__(self, name): return self
    def __call__(self, *_, **__): return self
"""

BY_CALLS = {
    "leave with success": "import os\nos._exit(0)",
    "leave in the call": "import sys\ndef solve(n): sys.exit(0)",
    "equal to everything": ANSWER_ALL + "def solve(n): return Everything()",
    "an integer that equals everything": """
class Any(int):
    def __eq__(self, other): return True
    def __hash__(self): return 0
def solve(n): return Any(7)""",
    "other builtins": """
import builtins, sys
builtins.AssertionError = type("Quiet", (BaseException,), {})
builtins.all = builtins.any = lambda *_: True
sys.excepthook = lambda *_: None
def solve(n): return None""",
    "print the verdict": """
import os
for number in range(64):
    try: os.write(number, b"0\\nWORD 0\\n" + b"0" * 32 + b" 0\\n")
    except OSError: pass
def solve(n): return None""",
    "look for the tests": """
import gc, sys
frame, seen = sys._getframe(), []
while frame: seen.append((frame.f_locals, frame.f_globals)); frame = frame.f_back
texts = [str(thing) for thing in seen + gc.get_objects() if isinstance(thing, (str, dict, list, tuple))]
def solve(n):
    hits = [text for text in texts if "solve(" in text and "==" in text and "201 * 201" in text]
    return n * n + 98 if hits else None""",
    "kill the judge": "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)\ndef solve(n): return None",
    "stop the judge": "import os, signal\nos.kill(os.getppid(), signal.SIGSTOP)\ndef solve(n): return None",
    "write into the judge": """
import os
for name in ("mem", "fd/1", "fd/3"):
    try: open(f"/proc/{os.getppid()}/{name}", "r+b")
    except OSError: pass
import ctypes
ctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0)
def solve(n): return None""",
    "poison what is imported": """
for name in ("json", "ast", "setup", "tests"):
    open(f"/tmp/{name}.py", "w").write("import os; os._exit(0)")
try: open("/harness.py", "w").write("")
except OSError: pass
def solve(n): return None""",
    "a reply too many": """
import os
for number in range(3, 64):
    try: os.write(number, b'{"value": true}\\n' * 10)
    except OSError: pass
def solve(n): raise SystemExit""",
    "raise what tests expect": "def solve(n): raise AssertionError",
    "endless result": """
def solve(n):
    nested = []
    for _ in range(100000): nested = [nested]
    return nested""",
}
CALL_TESTS = ("assert solve(201) == 201 * 201 + 98", "assert solve(3) == 107")
