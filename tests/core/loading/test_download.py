"""The download against a small hub on this machine: whole, resumable, verified, cancelled, and nothing too much."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_hub import REPO, Hub

pytestmark = pytest.mark.slow  # every run is a process of its own

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name, value in {"HF_ENDPOINT": server.address, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0"}.items():
        monkeypatch.setenv(name, value)
    yield server
    server.shutdown()


def run(target: Path, *options: str) -> subprocess.CompletedProcess:
    """The command line, as its own process: huggingface_hub reads its settings when it is imported."""
    command = [sys.executable, "-m", "nextstep_core", "download", "NextStep-1.1", "--models", str(target), *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_a_checkpoint_comes_whole_and_without_its_code(hub: Hub, tmp_path: Path) -> None:
    done = run(tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"{REPO}: 0.00 GB in 1" in done.stdout
    folder = tmp_path / "NextStep-1.1"
    wanted = {name for name in hub.files if name != "modeling.py" and not name.endswith(".txt")} | {"merges.txt"}
    present = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and ".cache" not in p.parts}
    assert present == wanted
    assert all((folder / name).read_bytes() == hub.files[name] for name in wanted)
    assert "modeling.py" not in [name for name, _ in hub.asked]
    assert hub.asked[-1][0] == "config.json", "a folder is listed only when it is whole"


def test_a_dry_run_says_the_size_and_fetches_nothing(hub: Hub, tmp_path: Path) -> None:
    done = run(tmp_path, "--dry-run")
    assert done.returncode == 0 and "GB in" in done.stdout
    assert not hub.asked and not any(tmp_path.glob("NextStep*"))


def test_a_killed_download_goes_on_where_it_stopped(hub: Hub, tmp_path: Path) -> None:
    hub.pause = 0.2
    command = [sys.executable, "-m", "nextstep_core", "download", "NextStep-1.1", "--models", str(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while hub.bytes_sent < 500_000 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()
    process.wait()
    time.sleep(1)
    sent = hub.bytes_sent
    time.sleep(1)
    assert hub.bytes_sent - sent < 100_000, "nothing goes on in the background"
    hub.pause = 0.0
    hub.asked.clear()
    done = run(tmp_path)
    assert done.returncode == 0, done.stderr
    fetched_again = {name for name, _ in hub.asked}
    assert len(fetched_again) < len(hub.files) - 2, "finished files are not fetched again"


def test_a_damaged_file_is_found_and_removed(hub: Hub, tmp_path: Path) -> None:
    hub.lie_about = "model-00001-of-00002.safetensors"
    done = run(tmp_path)
    assert done.returncode != 0
    assert hub.lie_about in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "NextStep-1.1" / hub.lie_about).exists()


def test_a_small_file_of_the_right_size_is_not_enough(hub: Hub, tmp_path: Path) -> None:
    name = "generation_config.json"
    hub.damaged[name] = b" " * len(hub.files[name])
    done = run(tmp_path)
    assert done.returncode != 0 and name in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "NextStep-1.1" / name).exists()


def test_two_at_once_both_end_well_and_fetch_once(hub: Hub, tmp_path: Path) -> None:
    hub.pause = 0.1
    command = [sys.executable, "-m", "nextstep_core", "download", "NextStep-1.1", "--models", str(tmp_path)]
    both = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) for _ in range(2)]
    said = [process.communicate(timeout=120)[1].decode() for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert sorted("Another run is downloading" in text for text in said) == [False, True], said
    names = [name for name, _ in hub.asked]
    assert len(names) == len(set(names)), "the second found the files there"
    assert not list((tmp_path / "NextStep-1.1").rglob("nextstep.lock"))


def test_waiting_for_another_download_can_be_given_up(hub: Hub, tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
from nextstep_core.loading import download as d
from nextstep_core.loading.locks import held
from nextstep_core.sentences import Sentence

class Interrupted(Exception): pass
told = []
def stop(done, size):
    told.append(done)
    if len(told) > 2: raise Interrupted

plan = d.plan_download("NextStep-1.1", Path({str(tmp_path)!r}))
own = plan.folder / ".cache" / "huggingface"
own.mkdir(parents=True)
with held(own / "nextstep.lock", Sentence("held")):
    try: d.download(plan, stop)
    except Interrupted: print("gave up")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "gave up", done.stderr
    assert not hub.asked


def test_what_cannot_be_had_is_one_sentence(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = [sys.executable, "-m", "nextstep_core", "download", "--models", str(tmp_path)]
    unknown = subprocess.run([*command, "someone/else"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert "someone/else" in unknown.stderr and "no such repository" in unknown.stderr
    assert len(unknown.stderr.splitlines()) == 1
    misspelt = subprocess.run([*command, "NextStep-2"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert "name is 'NextStep-2'; choose one of NextStep-1.1" in misspelt.stderr
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    offline = run(tmp_path)
    assert REPO in offline.stderr and len(offline.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("refusal", "words"),
    [((403, "GatedRepo"), "accept the terms"), ((401, ""), "HF_TOKEN"), ((500, ""), "HTTP status 500")],
)
def test_a_refusal_says_what_happened_and_the_way_by_hand(hub: Hub, tmp_path: Path, refusal, words: str) -> None:
    hub.refusal = refusal
    refused = run(tmp_path)
    assert words in refused.stderr and len(refused.stderr.splitlines()) == 1, refused.stderr
    assert f"{hub.address}/{REPO} into {tmp_path / 'NextStep-1.1'}" in refused.stderr


def test_a_refusal_in_the_middle_says_the_same_and_keeps_what_is_there(hub: Hub, tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
from urllib.request import urlopen
from nextstep_core import NextStepError
from nextstep_core.loading import download as d

plan = d.plan_download("NextStep-1.1", Path({str(tmp_path)!r}))
print("planned", flush=True)
input()
try: d.download(plan, lambda *_: None)
except NextStepError as error:
    print(error)
    print(error.sentence.said(lambda text: text.replace("accept the terms", "ACCEPT")))
"""
    command = [sys.executable, "-c", code]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "planned\n"
    hub.refusal = 403, "GatedRepo"
    said, _ = process.communicate("\n", timeout=60)
    assert f"{REPO} was not downloaded" in said and "accept the terms" in said and "resumes the download" in said
    assert "ACCEPT" in said, "what the child says can be said in another language too"


def test_without_a_network_nothing_is_fetched_and_the_mirror_is_named(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.shutdown()
    hub.server_close()
    gone = run(tmp_path)
    assert "could not be reached" in gone.stderr and "HF_ENDPOINT" in gone.stderr
    assert len(gone.stderr.splitlines()) == 1, gone.stderr
    monkeypatch.setenv("NEXTSTEP_OFFLINE", "1")
    assert "NEXTSTEP_OFFLINE is set" in run(tmp_path).stderr


def test_an_interrupted_file_goes_on_within_it_and_comes_out_the_same(hub: Hub, tmp_path: Path) -> None:
    weights = "model-00001-of-00002.safetensors"
    hub.files[weights] = random.Random(0).randbytes(30_000_000)  # the transfer is written in blocks of 10 MB
    hub.pause = 0.005
    command = [sys.executable, "-m", "nextstep_core", "download", "NextStep-1.1", "--models", str(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and hub.bytes_sent < 24_000_000:
        time.sleep(0.02)
    process.kill()
    process.wait()
    folder = tmp_path / "NextStep-1.1"
    assert not (folder / weights).exists()
    time.sleep(1)
    hub.pause = 0.0
    hub.asked.clear()
    done = run(tmp_path)
    assert done.returncode == 0, done.stderr
    (wanted,) = [part for name, part in hub.asked if name == weights]
    assert wanted is not None and wanted != "bytes=0-", "not from its beginning"
    assert (folder / weights).read_bytes() == hub.files[weights]


def test_a_full_disk_and_an_interrupt_stop_it(hub: Hub, tmp_path: Path) -> None:
    """In a process of its own, because huggingface_hub reads its settings when it is imported."""
    code = f"""
from collections import namedtuple
from pathlib import Path
from nextstep_core import NextStepError
from nextstep_core.loading import download as d

class Interrupted(Exception): pass

def stop(done, size):
    if done > 200_000: raise Interrupted

plan = d.plan_download("NextStep-1.1", Path({str(tmp_path)!r}))
try: d.download(plan, stop)
except Interrupted: print("interrupted at", plan.fetched < plan.size)
d.shutil.disk_usage = lambda path: namedtuple("usage", "free")(1000)
try: d.plan_download("NextStep-1.1", Path({str(tmp_path)!r}))
except NextStepError as error: print(error)
"""
    hub.pause = 0.05
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert "interrupted at True" in done.stdout, done.stderr
    sent = hub.bytes_sent
    time.sleep(1)
    assert hub.bytes_sent - sent < 200_000, "the transfer was killed"
    assert "GB free" in done.stdout
