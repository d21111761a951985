"""Shipped code executes nothing that it was given and starts no program but its own download."""

from __future__ import annotations

from pathlib import Path

import pytest
from source_rules import CHILD, COMPILING, faults

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = [
    ROOT / "__init__.py",
    *sorted((ROOT / "nodes").rglob("*.py")),
    *sorted((ROOT / "nextstep_core").rglob("*.py")),
]

BAD = {
    "eval('1')": "eval",
    "run = exec": "exec",
    "compile('1', '', 'eval')": "compile",
    "__import__(name)": "__import__",
    "import pickle": "pickle",
    "import os, marshal": "marshal",
    "from shelve import open": "shelve",
    "import dill as harmless": "dill",
    "import torch\ntorch.load(path)": "weights_only",
    "import torch\ntorch.load(path, weights_only=False)": "weights_only",
    "from torch import load\nload(path, weights_only=safe)": "weights_only",
    "from transformers import AutoModel\nAutoModel.from_pretrained(path, trust_remote_code=True)": "trust_remote_code",
    "options = {'trust_remote_code': True}": "trust_remote_code",
    "import os\nos.system('ls')": "os.system",
    "from os import popen as read\nread('ls')": "os.popen",
    "import os as o\no.execv('ls', [])": "os.execv",
    "import os\ngetattr(os, 'sys' + 'tem')('ls')": "asks a module",
    "import subprocess\nsubprocess.run(['ls'])": "subprocess.run",
    "from subprocess import check_output": None,
    "from subprocess import check_output\ncheck_output(['ls'])": "subprocess.check_output",
    "import pip": "pip",
    "import importlib\nimportlib.import_module(name)": "a variable",
    "from importlib import import_module\nimport_module('.x', package)": "a variable",
    "import builtins": "builtins",
    "import ctypes": "ctypes",
    "import torch\ntorch.hub.load('a/b', 'c')": "torch.hub.load",
    "import numpy as np\nnp.load(path, allow_pickle=True)": "numpy.load",
}
GOOD = [
    "import re\nre.compile('x')",
    "model.eval()",
    "import torch\ntorch.load(path, weights_only=True)",
    "from importlib import import_module\nimport_module(HOMES[name], __name__)",
    "import os\nos.stat(path), os.path.isfile(path)",
]
POPEN = "import subprocess, sys\n"
CHILDREN = {
    "subprocess.Popen([sys.executable, '-m', 'x'])": True,
    "command = [sys.executable, '-m', 'x']\nsubprocess.Popen(command, stdin=subprocess.PIPE)": True,
    "subprocess.Popen([sys.executable, '-m', name])": False,
    "subprocess.Popen('x', shell=True)": False,
    "subprocess.Popen(['x'], shell=flag)": False,
    "command = ['x']\ncommand += [name]\nsubprocess.Popen(command)": False,
    "command = ['x']\ncommand.append(name)\nsubprocess.Popen(command)": False,
    "command = ['x']\ncommand = name\nsubprocess.Popen(command)": False,
    "def f(command):\n    subprocess.Popen(command)": False,
    "subprocess.run(['x'])": False,
}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(ROOT)))
def test_shipped_code_executes_nothing_that_it_was_given(path: Path) -> None:
    assert not faults(path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix())


@pytest.mark.parametrize("source", BAD)
def test_each_rule_is_seen_to_fail(source: str) -> None:
    found, word = faults(source, "nodes/x.py"), BAD[source]
    assert any(word in fault for fault in found) if word else not found, found


@pytest.mark.parametrize("source", GOOD)
def test_what_only_looks_alike_is_allowed(source: str) -> None:
    assert not faults(source, "nodes/x.py")


@pytest.mark.parametrize("source", CHILDREN)
def test_the_downloads_child_has_a_command_line_of_its_own(source: str) -> None:
    assert (not faults(POPEN + source, CHILD[0])) is CHILDREN[source]
    assert faults(POPEN + source, "nextstep_core/loading/store.py"), "and nobody else has one"


def test_only_our_own_c_is_compiled() -> None:
    compiles = "import ctypes, subprocess\nsubprocess.run(['cc'])\nctypes.CDLL(path)"
    assert not faults(compiles, COMPILING[0])
    assert faults(compiles, "nextstep_core/runtime/trials.py"), "nobody else does"
    assert faults("import subprocess\nsubprocess.run('cc', shell=True)", COMPILING[0])
    assert faults("import subprocess\nsubprocess.Popen(['cc'])", COMPILING[0])
    sources = {path.name for path in (ROOT / "nextstep_core").rglob("*.c")}
    assert sources == {"rows.c", "head.c"}, "and the rules were made for what they know"
