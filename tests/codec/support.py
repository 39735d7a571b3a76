"""What the codec's tests share: messages compiled from proto/, namespaces, and the programs under test.

Everything that is made here goes when this process goes, however it goes: namespaces live in child processes, and children are
killed by the kernel with their parent.
"""

import ctypes
import importlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import traceback

# Far over what anything here needs, so that a machine under load fails nothing.
PATIENCE = 30.0
HERE = os.path.dirname(os.path.abspath(__file__))
AMBIDEX = os.environ.get("AMBIDEX") or os.path.join(HERE, "../../target/debug/ambidex")
# Before a command: the kernel kills it with its parent.
WITH_PARENT = ["setpriv", "--pdeathsig", "KILL", "--"]
DIRECTORIES = []
_libc = ctypes.CDLL(None, use_errno=True)


def require(*modules):
    """Ends with a sentence that says what to install."""
    packages = {"google.protobuf": "python3-protobuf", "grpc": "python3-grpcio", "cryptography": "python3-cryptography"}
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError as error:
            sys.exit(f"the codec's tests need Debian's {packages[module]} (apt-get install {packages[module]}): {error}")
    if shutil.which("protoc") is None:
        sys.exit("the codec's tests need protoc (apt-get install protobuf-compiler)")


def directory():
    """A directory that goes at the end."""
    path = tempfile.mkdtemp(prefix=f"codec-{os.getpid()}-")
    DIRECTORIES.append(path)
    return path


def messages(*names):
    """The modules that protoc makes of files in proto/."""
    require("google.protobuf")
    into = directory()
    source = os.path.join(HERE, "proto")
    files = [os.path.join(source, file) for file in sorted(os.listdir(source))]
    done = subprocess.run(["protoc", f"--python_out={into}", "-I", source, *files], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"protoc: {done.stderr}")
    sys.path.insert(0, into)
    modules = [importlib.import_module(f"{name}_pb2") for name in names]
    # Nothing stays of a program that is killed.
    shutil.rmtree(into)
    sys.path.remove(into)
    return modules


class Netns:
    """A network namespace with its loopback up."""

    def __init__(self):
        self.holder = subprocess.Popen([*WITH_PARENT, "unshare", "--net", "sleep", "3600"])
        self.path = f"/proc/{self.holder.pid}/ns/net"
        own = os.readlink("/proc/self/ns/net")
        # The child has a namespace of its own only a moment after it was born.
        eventually("a network namespace", lambda: os.readlink(self.path) != own)
        self.run("ip", "link", "set", "lo", "up")
        self.fd = os.open(self.path, os.O_RDONLY)
        self.inode = os.fstat(self.fd).st_ino

    def inside(self, *command):
        return ["nsenter", f"--net={self.path}", *command]

    def run(self, *command):
        done = subprocess.run(self.inside(*command), capture_output=True, text=True)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def listening(self):
        """Ports on which something accepts."""
        lines = self.run("ss", "-ltnH").splitlines()
        return {int(line.split()[3].rsplit(":", 1)[1]) for line in lines}

    def socket(self, *arguments):
        """A socket of this namespace."""
        own = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        try:
            self.enter(self.fd)
            return socket.socket(*arguments)
        finally:
            self.enter(own)
            os.close(own)

    @staticmethod
    def enter(fd):
        if _libc.setns(fd, 0x40000000):
            raise OSError(ctypes.get_errno(), "setns")


class Program:
    """The program under test, in a namespace, with its log."""

    def __init__(self, netns, arguments, environment):
        self.log = os.path.join(directory(), "log")
        inherited = {name: os.environ[name] for name in ("PATH", "RUST_BACKTRACE") if name in os.environ}
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [*WITH_PARENT, *netns.inside(AMBIDEX, *arguments)],
                env={**inherited, "RUST_LOG": "info", **environment},
                stdout=log,
                stderr=log,
            )
        LOGS.append(self.log)

    def alive(self):
        return self.process.poll() is None

    def text(self):
        with open(self.log, errors="replace") as log:
            return log.read()

    def stop(self):
        self.process.kill()
        self.process.wait()


LOGS = []


def eventually(what, condition):
    """Waits until a condition holds, and returns what it returned."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            result, error = condition(), None
        except (OSError, AssertionError) as failed:
            result, error = None, failed
        if result:
            return result
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {PATIENCE:.0f} s: {what}" + (f" ({error!r})" if error else ""))
        time.sleep(0.02)


def page(netns, port, path):
    """Status and body of a page on a namespace's loopback."""
    connection = netns.socket(socket.AF_INET, socket.SOCK_STREAM)
    connection.settimeout(PATIENCE)
    with connection:
        connection.connect(("127.0.0.1", port))
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        answer = b""
        while piece := connection.recv(65536):
            answer += piece
    head, _, body = answer.partition(b"\r\n\r\n")
    if b"chunked" in head.lower():
        body = unchunked(body)
    return int(head.split()[1]), body.decode()


def unchunked(body):
    whole = b""
    while body:
        size, _, rest = body.partition(b"\r\n")
        size = int(size, 16)
        whole, body = whole + rest[:size], rest[size + 2 :]
        if size == 0:
            break
    return whole


def main(cases):
    """Runs the case that the command line names."""
    name = sys.argv[1] if len(sys.argv) == 2 else ""
    if name not in cases:
        sys.exit(f"usage: {sys.argv[0]} {'|'.join(cases)}")
    try:
        cases[name]()
        code = 0
        print(f"{name}: held")
    except BaseException:
        code = 1
        traceback.print_exc()
        for log in LOGS:
            with open(log, errors="replace") as file:
                print(f"--- end of {log}:\n" + "".join(file.readlines()[-40:]), file=sys.stderr)
    for path in DIRECTORIES:
        shutil.rmtree(path, ignore_errors=True)
    sys.stdout.flush()
    sys.stderr.flush()
    # Threads that serve are not waited for; child processes die with this one.
    os._exit(code)
