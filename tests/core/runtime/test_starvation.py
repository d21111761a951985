"""A process that is given too little memory draws its picture, or says in one sentence that it cannot."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
CODE = """
import resource, sys, torch
from nextstep_core import NextStepError, NextStepPipeline
torch.set_num_threads(1)
pipe = NextStepPipeline.from_pretrained("tiny", dtype=torch.float32)
pipe.generate("a red circle", height=32, width=32, steps=2)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (int(sys.argv[1]) << 20), resource.RLIM_INFINITY))
try:
    prompts = ["a red circle"] * 8
    print("PICTURES", len(pipe.generate(prompts, height=128, width=128, steps=2).images))
except NextStepError as error:
    print("SENTENCE", error)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells how much a process takes")
@pytest.mark.parametrize("megabytes", [1, 40])
def test_a_starved_process_ends_with_a_sentence_or_a_picture(megabytes: int) -> None:
    command = [sys.executable, "-c", CODE, str(megabytes)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(("PICTURES 8", "SENTENCE")), done.stdout + done.stderr
    assert "Traceback" not in done.stderr
