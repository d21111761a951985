"""What shipped code never does, read from its syntax tree: execute what it was given, or start other programs."""

from __future__ import annotations

import ast
from collections.abc import Iterator

# Modules that execute what they read, install packages, or lead around these rules.
FORBIDDEN_MODULES = {
    "pickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "jsonpickle", "joblib", "imp", "runpy", "code",
    "codeop", "pip", "ensurepip", "venv", "pty", "builtins", "ctypes", "cffi", "distutils", "setuptools",
}  # fmt: skip
FORBIDDEN_NAMES = {
    "eval", "exec", "compile", "__import__", "globals", "vars", "breakpoint", "os.system", "os.popen", "os.startfile",
    "asyncio.create_subprocess_exec", "asyncio.create_subprocess_shell", "importlib.reload", "torch.hub.load",
    "torch.package.PackageImporter", "torch.jit.load", "numpy.load", "multiprocessing.Process",
    "concurrent.futures.ProcessPoolExecutor",
}  # fmt: skip
FORBIDDEN_BEGINNINGS = ("os.exec", "os.spawn", "os.posix_spawn", "subprocess.", "torch.utils.cpp_extension.")
# What may be used where, once its arguments were looked at.
CHILD = ("nextstep_core/loading/download.py", "subprocess.Popen")
CHILD_PIPES = {"subprocess.PIPE", "subprocess.DEVNULL"}
# Our own C, which the user's compiler makes a library of: nothing that was given to us is compiled or loaded.
NATIVE = {f"nextstep_core/runtime/native/{name}.py" for name in ("compiler", "rows", "head")}
COMPILING = (
    "nextstep_core/runtime/native/compiler.py",
    {"subprocess.run", "subprocess.TimeoutExpired"},
)


def faults(source: str, file: str) -> list[str]:
    """What the rules forbid in a file's text, each with its line."""
    tree = ast.parse(source)
    names = dict(_imported(tree))
    forbidden = FORBIDDEN_MODULES - ({"ctypes"} if file in NATIVE else set())
    found = [(node.lineno, f"imports {module}") for node, module in _modules(tree) if module in forbidden]
    for node in ast.walk(tree):
        if isinstance(node, (ast.Name, ast.Attribute)):
            found += [(node.lineno, f"uses {name}") for name in _forbidden(node, names, file)]
        elif isinstance(node, ast.Call):
            found += [(node.lineno, said) for said in _call(node, names, tree)]
        elif isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
            found.append((node.value.lineno, "trust_remote_code"))
        elif isinstance(node, ast.Constant) and node.value == "trust_remote_code":
            found.append((node.lineno, "trust_remote_code"))
    return [f"{file}:{line} {said}" for line, said in sorted(set(found))]


def _modules(tree: ast.AST) -> Iterator[tuple[ast.stmt, str]]:
    """(statement, first part of the name) of every module that is imported."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name.split(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node, (node.module or "").split(".")[0]


def _imported(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """(name here, full name) of what is imported, whatever it is called here."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                first = alias.name.split(".")[0]
                yield (alias.asname, alias.name) if alias.asname else (first, first)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from ((alias.asname or alias.name, f"{node.module}.{alias.name}") for alias in node.names)


def _full_name(node: ast.AST, names: dict[str, str]) -> str | None:
    """`a.b.c` with what `a` was imported as; None for what is no name."""
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        above = _full_name(node.value, names)
        return None if above is None else f"{above}.{node.attr}"
    return None


def _forbidden(node: ast.Name | ast.Attribute, names: dict[str, str], file: str) -> Iterator[str]:
    name = _full_name(node, names)
    if name is None or (file, name) == CHILD or file == CHILD[0] and name in CHILD_PIPES:
        return
    if file == COMPILING[0] and name in COMPILING[1]:
        return
    if name in FORBIDDEN_NAMES or name.startswith(FORBIDDEN_BEGINNINGS):
        yield name


def _call(node: ast.Call, names: dict[str, str], tree: ast.AST) -> Iterator[str]:
    name = _full_name(node.func, names)
    keywords = {keyword.arg: keyword.value for keyword in node.keywords}
    if name == "torch.load" and not _is(keywords.get("weights_only"), True):
        yield "torch.load without weights_only=True"
    if name == "importlib.import_module":
        within = len(node.args) == 2 and _full_name(node.args[1], names) == "__name__"
        if not within:  # a name relative to our own package stays inside it
            yield "imports what a variable says"
    if (
        name == "getattr"
        and len(node.args) > 1
        and _full_name(node.args[0], names) in ("os", "subprocess", "importlib")
    ):
        wanted = node.args[1]
        if not (isinstance(wanted, ast.Constant) and str(wanted.value).isupper()):  # such as os.O_BINARY
            yield "asks a module for a name"
    if name in (CHILD[1], "subprocess.run") and "shell" in keywords:
        yield "a shell"
    if name == CHILD[1] and (not node.args or not _is_fixed(node.args[0], names, tree)):
        yield "a command line that is not written here"


def _is(node: ast.AST | None, value: object) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def _is_fixed(node: ast.AST, names: dict[str, str], tree: ast.AST) -> bool:
    """Whether a command is a list of constants and this Python, here or in the only place that names it."""
    if isinstance(node, ast.Name):
        given = [
            statement.value
            for statement in ast.walk(tree)
            if isinstance(statement, ast.Assign)
            and any(isinstance(target, ast.Name) and target.id == node.id for target in statement.targets)
        ]
        changed = [n for n in ast.walk(tree) if isinstance(n, ast.AugAssign) and _full_name(n.target, {}) == node.id]
        changed += [n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and _full_name(n.value, {}) == node.id]
        return len(given) == 1 and not changed and _is_fixed(given[0], names, tree)
    return isinstance(node, ast.List) and all(
        isinstance(part, ast.Constant) or _full_name(part, names) == "sys.executable" for part in node.elts
    )
