"""Downloads from a local server that stalls, cuts, corrupts, redirects and is busy."""

import errno
import hashlib
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat import dataset
from nanochat.common import UserError
from nanochat.download import fetch, fetch_all, locked

ROOT = Path(__file__).parents[1]
BODY = bytes(i * i % 251 for i in range(300_000))
GOOD = hashlib.sha256(BODY).hexdigest()
HASHED = {"ETag": f'"{GOOD}"'}
FAST = dict(timeout=0.4, pause=0.01)


class Server(ThreadingHTTPServer):
    "Answers each request for a path with the next trick of its script, then well."

    daemon_threads = True

    def __init__(self, files: dict[str, bytes], script: dict[str, list]):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = files
        self.script = script
        self.asked = []
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.now = 0
        self.most = 0
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def ranges(self, name: str) -> list[str | None]:
        return [r for path, r in self.asked if path == name]


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def reply(self, status: int, body: bytes = b"", length: int | None = None, **more):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        for key, value in more.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        site = self.server
        name = self.path.strip("/")
        with site.lock:
            site.asked.append((name, self.headers["Range"]))
            site.now += 1
            site.most = max(site.most, site.now)
            steps = site.script.get(name, [])
            trick, extra = steps.pop(0) if steps else ("well", {})
        try:
            self.answer(site, name, trick, extra)
        finally:
            with site.lock:
                site.now -= 1

    def answer(self, site, name, trick, extra):
        body = site.files.get(name)
        if isinstance(trick, int):
            return self.reply(trick, **extra)
        if body is None:
            return self.reply(404)
        begin = 0
        if (asked := self.headers["Range"]) and trick != "ignore range":
            begin = int(asked.removeprefix("bytes=").rstrip("-"))
            if begin >= len(body):
                return self.reply(416)
        rest = body[begin:]
        status = 206 if begin else 200
        if trick in ("cut", "stall"):
            self.reply(status, rest[: len(rest) // 2], len(rest), **extra)
            time.sleep(6 if trick == "stall" else 0)
        elif trick == "corrupt":
            spoiled = rest[:-7] + bytes([rest[-7] ^ 1]) + rest[-6:]
            self.reply(status, spoiled, **extra)
        elif trick == "long":
            self.reply(status, rest + b"more", **extra)
        elif trick == "drip":
            time.sleep(1)  # the other process comes in between
            self.reply(status, rest, **extra)
        elif trick == "slow":
            time.sleep(0.3)
            self.reply(status, rest, **extra)
        else:
            self.reply(status, rest, **extra)


@pytest.fixture
def serve():
    "Start servers; stop them afterwards."
    started = []

    def start(script: list | dict, files: dict | None = None) -> Server:
        script = script if isinstance(script, dict) else {"x": script}
        started.append(Server(files or {"x": BODY}, script))
        return started[-1]

    yield start
    for server in started:
        server.shutdown()
        server.server_close()


def get(folder: Path, *servers: Server, name: str = "x", **options) -> Path:
    return fetch(name, [s.url for s in servers], folder, **{**FAST, **options})


def only(folder: Path, *names: str) -> bool:
    return sorted(f.name for f in folder.iterdir()) == sorted(names)


HALF = "bytes=150000-"


@pytest.mark.parametrize(
    "script, ranges",
    [
        ([], [None]),
        ([("cut", {})], [None, HALF]),
        ([("cut", {}), ("cut", {})], [None, HALF, "bytes=225000-"]),
        ([("stall", {})], [None, HALF]),
        ([("cut", {}), ("ignore range", {})], [None, HALF]),
        ([("cut", {}), (416, {})], [None, HALF, None]),
        ([(500, {}), (503, {}), (429, {})], [None] * 4),
        ([("corrupt", HASHED)], [None, None]),
        ([("cut", HASHED), ("corrupt", HASHED)], [None, HALF, None]),
        ([("long", {"X": "1"} | HASHED)], [None, None]),
    ],
)
def test_whole_after_trouble(serve, tmp_path, script, ranges):
    server = serve(list(script))
    begin = time.monotonic()
    assert get(tmp_path, server).read_bytes() == BODY
    assert time.monotonic() - begin < 5  # not as long as the server stalls
    assert server.ranges("x") == ranges
    assert only(tmp_path, "x")
    get(tmp_path, server)
    assert len(server.asked) == len(ranges)  # it is there: nothing is asked


def test_nothing_has_the_final_name_before_it_is_whole(serve, tmp_path):
    server = serve([("cut", {})] * 2)
    with pytest.raises(UserError, match=r"x: .*cut after 225,000 of 300,000 bytes"):
        get(tmp_path, server, attempts=2)
    assert only(tmp_path, "x.part")
    assert (tmp_path / "x.part").read_bytes() == BODY[:225_000]
    get(tmp_path, server)  # another day
    assert server.ranges("x")[-1] == "bytes=225000-" and only(tmp_path, "x")


def test_corruption_that_stays_is_an_error_and_leaves_nothing(serve, tmp_path):
    server = serve([("corrupt", HASHED)] * 3)
    with pytest.raises(UserError, match=f"sha256 is .* instead of {GOOD}"):
        get(tmp_path, server, attempts=3)
    assert only(tmp_path) and server.ranges("x") == [None] * 3


def test_a_given_hash_counts_more_than_the_servers(serve, tmp_path):
    wrong = {"ETag": '"' + "0" * 64 + '"'}
    get(tmp_path, serve([("well", wrong)]), sha256=GOOD, attempts=1)
    with pytest.raises(UserError, match="instead of 0000"):
        get(tmp_path / "b", serve([("well", wrong)]), attempts=1)
    get(tmp_path / "c", serve([("well", {"ETag": '"a-plain-tag"'})]), attempts=1)


def test_redirect_keeps_range_size_and_hash(serve, tmp_path):
    store = serve([("cut", {}), ("corrupt", {})], {"x": BODY})
    linked = {
        "Location": f"{store.url}/x",
        "X_Linked_ETag": f'"{GOOD}"',
        "X_Linked_Size": str(len(BODY)),
    }
    hub = serve([(302, linked)] * 3)
    assert get(tmp_path, hub).read_bytes() == BODY
    assert store.ranges("x") == [None, HALF, None]  # corrupt: from the beginning


def test_wrong_size_is_refused(serve, tmp_path):
    store = serve([], {"x": BODY + b"more"})
    linked = {"Location": f"{store.url}/x", "X_Linked_Size": str(len(BODY))}
    with pytest.raises(UserError, match="300,004 bytes instead of 300,000"):
        get(tmp_path, serve([(302, linked)] * 2), attempts=2)
    store.files["x"] = BODY[:-1]
    with pytest.raises(UserError, match="cut after 299,999 of 300,000 bytes"):
        get(tmp_path, serve([(302, linked)]), attempts=1)


def test_retry_after_is_obeyed_and_pauses_grow(serve, tmp_path, monkeypatch):
    slept = []
    monkeypatch.setattr("nanochat.download.time.sleep", slept.append)
    busy = [(429, {"Retry_After": "7"}), (500, {}), (500, {}), (503, {})]
    get(tmp_path, serve(busy), pause=0.5)
    assert slept[0] == 7
    for n, pause in enumerate(slept[1:], 1):
        assert 0.5 * 2**n <= pause <= 2**n
    assert len(slept) == 4


def test_refusal_is_not_repeated_and_the_next_mirror_is_asked(serve, tmp_path):
    first, second = serve([(404, {})] * 9), serve([(500, {})])
    assert get(tmp_path, first, second).read_bytes() == BODY
    assert len(first.asked) == 1 and len(second.asked) == 2
    gone = serve([(404, {})] * 9)
    with pytest.raises(UserError, match=r"could not fetch x: http.*404"):
        get(tmp_path / "b", gone)
    assert len(gone.asked) == 1


def test_mirror_continues_what_another_began(serve, tmp_path):
    first, second = serve([("cut", {})]), serve([])
    assert get(tmp_path, first, second).read_bytes() == BODY
    assert second.ranges("x") == [HALF]


def test_no_server_at_all(serve, tmp_path):
    server = serve([])
    server.shutdown()
    server.server_close()
    with pytest.raises(UserError, match="could not fetch x: http://127"):
        get(tmp_path, server, attempts=2)


def test_full_disk_is_not_retried(serve, tmp_path, monkeypatch):
    server = serve([])

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("nanochat.download.verify", full)
    with pytest.raises(OSError, match="No space left"):
        get(tmp_path, server)
    assert len(server.asked) == 1


def test_parallel(serve, tmp_path, capsys):
    files = {str(i): BODY[i:] for i in range(8)}
    server = serve({str(i): [("slow", {})] for i in range(8)}, files)
    fetch_all(list(files), [server.url], tmp_path, workers=4, **FAST)
    assert server.most == 4 and only(tmp_path, *files)
    assert all((tmp_path / n).read_bytes() == body for n, body in files.items())
    assert capsys.readouterr().out.count("/8 ") == 8


def test_first_failure_ends_the_rest(serve, tmp_path):
    files = {str(i): BODY for i in range(1, 40)}
    server = serve({n: [("slow", {})] for n in files}, files)
    with pytest.raises(UserError, match="could not fetch 0"):
        fetch_all(["0", *files], [server.url], tmp_path, workers=2, **FAST)
    assert len(server.asked) < 20 and not list(tmp_path.glob("*.part"))


def test_checksums_beside_the_files(serve, tmp_path):
    sums = f"{GOOD}  x\n{'1' * 64} *y\n".encode()
    files = {"x": BODY, "y": BODY, "SHA256SUMS": sums}
    server = serve({"x": [("corrupt", {})], "SHA256SUMS": [(500, {})]}, files)
    fetch_all(["x"], [server.url], tmp_path, **FAST)
    assert (tmp_path / "x").read_bytes() == BODY and len(server.ranges("x")) == 2
    with pytest.raises(UserError, match=r"y: .*instead of 1111"):
        fetch_all(["x", "y"], [server.url], tmp_path, **FAST, attempts=2)
    assert only(tmp_path, "x")


def parquet(text: str) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": [text]}), sink)
    return sink.getvalue().to_pybytes()


@pytest.fixture
def shards(tmp_path, monkeypatch) -> dict[str, bytes]:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.delenv("NANOCHAT_OFFLINE", raising=False)
    last = dataset.HUB_SHARDS - 1
    return {f"shard_{i:05d}.parquet": parquet(f"text {i}") for i in (0, 1, last)}


FETCH = """
import sys
from pathlib import Path
from nanochat.download import fetch
print("ready", flush=True)
input()
fetch("x", [sys.argv[1]], Path(sys.argv[2]), timeout=5, pause=0.01)
print("done")
"""


def other(server, folder) -> subprocess.Popen:
    "Start a process that is about to fetch; a line lets it go."
    command = [sys.executable, "-c", FETCH, server.url, str(folder)]
    pipes = dict.fromkeys(("stdin", "stdout"), subprocess.PIPE)
    process = subprocess.Popen(command, cwd=ROOT, text=True, **pipes)
    assert process.stdout.readline() == "ready\n"
    return process


def go(process) -> None:
    process.stdin.write("\n")
    process.stdin.flush()


def wait_for(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.slow
def test_two_processes_fetch_a_file_once(serve, tmp_path):
    server = serve([("drip", HASHED), ("drip", HASHED)])
    processes = [other(server, tmp_path) for _ in range(2)]
    for process in processes:
        go(process)
    assert [p.communicate()[0] for p in processes] == ["done\n"] * 2
    assert (tmp_path / "x").read_bytes() == BODY
    assert server.ranges("x") == [None] and only(tmp_path, "x")


@pytest.mark.slow
def test_a_killed_process_leaves_no_lock_and_its_bytes_are_used(serve, tmp_path):
    server = serve([("stall", HASHED)])
    killed, waiting = other(server, tmp_path), other(server, tmp_path)
    part = tmp_path / "x.part"
    go(killed)
    wait_for(lambda: part.exists() and part.stat().st_size == 150_000)
    go(waiting)
    time.sleep(1)
    assert waiting.poll() is None and server.ranges("x") == [None]
    killed.kill()
    killed.communicate()
    assert (tmp_path / ".x.lock").exists()  # the file is stale, the lock is not
    assert waiting.communicate()[0] == "done\n"
    assert server.ranges("x") == [None, HALF] and only(tmp_path, "x")
    assert (tmp_path / "x").read_bytes() == BODY


def test_many_threads_and_a_lock_that_is_deleted_under_them(tmp_path):
    inside = []
    most = []

    def work(number: int) -> None:
        with locked(tmp_path / "lock"):
            inside.append(number)
            most.append(len(inside))
            time.sleep(0.002)
            inside.remove(number)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(40)))
    assert max(most) == 1 and len(most) == 40 and only(tmp_path)


def test_a_folder_that_cannot_be_written_is_named(serve, tmp_path, monkeypatch):
    def closed(path, *args, **options):
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    server = serve([])
    monkeypatch.setattr("nanochat.download.open", closed, raising=False)
    with pytest.raises(
        UserError, match=r"Read-only.*writable, or set NANOCHAT_BASE_DIR"
    ):
        get(tmp_path, server)
    assert not server.asked
    monkeypatch.undo()
    monkeypatch.setattr(Path, "mkdir", closed)
    with pytest.raises(UserError, match="writable, or set NANOCHAT_BASE_DIR"):
        get(tmp_path / "new", server)


def test_the_network_may_go_away_in_the_middle(serve, tmp_path):
    server = serve([("cut", {})] * 20)
    with pytest.raises(UserError, match=r"cut after .* of 300,000 bytes"):
        get(tmp_path, server, attempts=1)
    server.shutdown()
    server.server_close()
    with pytest.raises(UserError, match=r"could not fetch x: http.*refused"):
        get(tmp_path, server, attempts=2)
    assert only(tmp_path, "x.part")  # what came is kept
    assert (tmp_path / "x.part").read_bytes() == BODY[:150_000]


def test_offline_names_what_is_missing(serve, shards, tmp_path, monkeypatch):
    server = serve({}, shards)
    dataset.download(1, urls=server.url, **FAST)
    before = len(server.asked)
    monkeypatch.setenv("NANOCHAT_OFFLINE", "1")
    dataset.download(1, urls=server.url)
    wanted = "NANOCHAT_OFFLINE is set.* lacks shard_00001.parquet: unset it"
    with pytest.raises(UserError, match=wanted):
        dataset.download(2, urls=server.url)
    with pytest.raises(UserError, match=r"shard_00008\.parquet and 1813 more"):
        dataset.download(-1, urls=server.url)
    assert len(server.asked) == before
    monkeypatch.setenv("NANOCHAT_OFFLINE", "0")
    dataset.download(2, urls=server.url, **FAST)


def test_mirrors_from_the_environment(serve, shards, tmp_path, monkeypatch):
    empty, full = serve({}, {"z": b""}), serve({}, shards)
    monkeypatch.setenv("NANOCHAT_DATA_URL", f"{empty.url}/, {full.url}")
    dataset.download(2, **FAST)
    assert only(tmp_path / "base_data", *shards)
    assert {name for name, _ in empty.asked} == {*shards, "SHA256SUMS"}


def test_a_page_that_is_no_parquet_is_refused(serve, shards, tmp_path):
    server = serve({}, shards | {"shard_00000.parquet": b"<html>log in</html>"})
    with pytest.raises(UserError, match=r"shard_00000\.parquet: .*not a Parquet file"):
        dataset.download(1, urls=server.url, **FAST, attempts=2)
    assert only(tmp_path / "base_data", "shard_01822.parquet")
