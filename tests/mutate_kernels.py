"""Mutation run over the Triton kernels: which small faults, planted one at a time, do the quick tests of an op miss?

    python tests/mutate_kernels.py [--sample N | --all] [--jobs N] [kernel ...]

Mutants are made of what `triton.jit` decorates, and of the PTX of one launch of each kernel. Each runs in a fork of a
process that has imported everything. What has been found out is kept in build/mutation.jsonl and build/mutation: a run
which was stopped goes on, as long as neither kernels nor what judges them changes. docs/mutation.md tells more.
"""

import argparse
import ast
import copy
import hashlib
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
KERNELS = ROOT / "kernels" / "gpu"
RESULTS = ROOT / "build" / "mutation.jsonl"
EXPLAINED = ROOT / "tests" / "gpu" / "surviving_mutants.txt"

TESTS = {  # of which kernel, as arguments of pytest
    "activation_mul": ["tests/gpu/test_activation_mul.py"],
    "all_reduce": ["tests/gpu/test_all_reduce.py"],
    "dequantize_4bit": ["tests/gpu/test_dequantize_4bit.py"],
    "embedding": ["tests/gpu/test_embedding.py"],
    "math": ["tests/gpu/test_sample.py", "-k", "exp_and_log"],
    "matmul": ["tests/gpu/test_matmul.py"],
    "matmul_4bit": ["tests/gpu/test_matmul_4bit.py"],
    "paged_attention": ["tests/gpu/test_paged_attention.py"],
    "rms_norm": ["tests/gpu/test_rms_norm.py"],
    "rotary_kv_write": ["tests/gpu/test_rotary_kv_write.py"],
    "sample": ["tests/gpu/test_sample.py"],
}
SAME_BITS = (
    "dequantize_4bit",
    "math",
    "matmul_4bit",
    "rotary_kv_write",
    "sample",
)  # have the bits of native ops: the least fault must be seen

OPERATORS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.FloorDiv: ast.Mod, ast.Mod: ast.FloorDiv, ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd, ast.LShift: ast.RShift, ast.RShift: ast.LShift, ast.BitXor: ast.BitOr,
}  # fmt: skip
FUNCTIONS = {"maximum": "minimum", "minimum": "maximum", "max": "min", "min": "max", "atomic_or": "atomic_and"}
SWAPPED = {"where": (1, 2), "div_rn": (0, 1), "_share": (0, 1)}  # arguments
CONFUSED = [  # names, where a function has both
    ("num_heads", "num_kv_heads"), ("HEAD_SIZE", "BLOCK_SIZE"), ("HEAD_SIZE", "ROTARY_SIZE"), ("x_stride", "k"),
    ("num_rows", "num_cols"), ("first_row", "first_col"), ("rows", "cols"), ("first_key", "last_key"),
    ("row_begin", "token_begin"), ("presence", "frequency"), ("allowed_begin", "allowed_end"), ("a", "b"),
    ("cos", "sin"), ("lowest", "last"), ("piece", "first_piece"), ("size", "stride"), ("begins", "ends"),
    ("gate", "up"), ("GROUP", "BLOCK_M"), ("at", "ids"), ("best", "temperature"), ("slot_ptr", "edits_ptr"),
]  # fmt: skip
UNTOUCHED_KEYWORDS = ("axis", "num_stages", "loop_unroll_factor", "input_precision", "sem", "propagate_nan")
OTHERS = {"lt": "le", "le": "lt", "gt": "ge", "ge": "gt"}


@dataclass(frozen=True)
class Mutant:
    """A changed module, or changed PTX of a kernel's compiled forms."""

    kernel: str
    name: str  # says what is changed, and is unique
    source: str = ""
    ptx: tuple[tuple[str, str], ...] = ()  # what it is, what it becomes


# ------------------------------------------------------------------------------------------------ changes of the source


def source_mutants(kernel: str, source: str, same_bits: bool) -> Iterator[Mutant]:
    """Every mutant of the functions that `triton.jit` decorates, and of the constants of the module."""
    lines = source.encode().splitlines(keepends=True)
    starts = [sum(map(len, lines[:i])) for i in range(len(lines) + 1)]

    def changed(node: ast.expr | ast.stmt, text: str) -> str:
        assert node.end_lineno is not None and node.end_col_offset is not None
        begin = starts[node.lineno - 1] + node.col_offset
        end = starts[node.end_lineno - 1] + node.end_col_offset
        return (source.encode()[:begin] + text.encode() + source.encode()[end:]).decode()

    seen: Counter[str] = Counter()
    for top in ast.parse(source).body:
        if isinstance(top, ast.FunctionDef) and any("triton.jit" in ast.unparse(d) for d in top.decorator_list):
            scope, statements = top.name, [x for x in ast.walk(top) if isinstance(x, ast.stmt) and x is not top]
        elif isinstance(top, ast.Assign) and "tl.constexpr" in ast.unparse(top.value):
            scope, statements = "module", [top]
        else:
            continue
        for statement in sorted(statements, key=lambda x: (x.lineno, x.col_offset)):
            if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
                continue  # docstring
            before = _header(statement)
            changes: list[tuple[str, str]] = []
            if isinstance(top, ast.FunctionDef) and _may_go(statement, top):
                changes.append(("dropped", changed(statement, "pass")))
            for parent, field, at, node in _expressions(statement):
                for new in _changes(node, top, same_bits):
                    _put(parent, field, at, new)
                    changes.append((_header(statement), changed(node, f"({ast.unparse(new)})")))
                    _put(parent, field, at, node)
            for after, text in changes:
                name = f"{scope}: {before} => {after}"
                seen[name] += 1
                yield Mutant(kernel, name + (f" #{seen[name]}" if seen[name] > 1 else ""), text)


def _header(statement: ast.stmt) -> str:
    """A statement in one line, without what is nested in it."""
    shown = copy.copy(statement)
    for field in ("body", "orelse"):
        if getattr(shown, field, None):
            setattr(shown, field, [])
    return " ".join(ast.unparse(shown).split())


def _may_go(statement: ast.stmt, function: ast.FunctionDef) -> bool:
    """Whether a function without this statement is still one: no name is missing."""
    if isinstance(statement, ast.Assign):
        earlier = {argument.arg for argument in function.args.args} | {
            x.id
            for x in ast.walk(function)
            if isinstance(x, ast.Name) and isinstance(x.ctx, ast.Store) and x.lineno < statement.lineno
        }
        return all(
            x.id in earlier for x in ast.walk(statement) if isinstance(x, ast.Name) and isinstance(x.ctx, ast.Store)
        )
    return isinstance(statement, ast.AugAssign | ast.Expr | ast.If | ast.While)


def _expressions(statement: ast.stmt) -> Iterator[tuple[ast.AST, str, int | None, ast.expr]]:
    """The expressions of a statement, but not of statements in it, with where they hang."""
    waiting: list[ast.AST] = [statement]
    while waiting:
        parent = waiting.pop(0)
        for field, value in ast.iter_fields(parent):
            if field == "annotation" or (isinstance(parent, ast.keyword) and parent.arg in UNTOUCHED_KEYWORDS):
                continue
            for at, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
                if isinstance(child, ast.expr) and not isinstance(getattr(child, "ctx", None), ast.Store):
                    yield parent, field, at, child
                if isinstance(child, ast.expr | ast.keyword) and not _is_shape(child):
                    waiting.append(child)


def _is_shape(node: ast.AST) -> bool:
    """Whether what is in a node does not compile with any other constant."""
    return isinstance(node, ast.Call) and ast.unparse(node.func) in ("tl.arange", "tl.program_id", "tl.num_programs")


def _put(parent: ast.AST, field: str, at: int | None, node: ast.expr) -> None:
    if at is None:
        setattr(parent, field, node)
    else:
        getattr(parent, field)[at] = node


def _changes(node: ast.expr, scope: ast.stmt, same_bits: bool) -> Iterator[ast.expr]:
    """What may stand for an expression by mistake."""

    def with_(**fields: Any) -> ast.expr:
        new = copy.copy(node)
        for name, value in fields.items():
            setattr(new, name, value)
        return new

    match node:
        case ast.Compare(ops=[operator]) if type(operator) in OPERATORS:
            yield with_(ops=[OPERATORS[type(operator)]()])
        case ast.BinOp(left=left, op=operator, right=right):
            if type(operator) in OPERATORS:
                yield with_(op=OPERATORS[type(operator)]())
            if isinstance(operator, ast.Mult | ast.BitAnd | ast.BitOr | ast.Div | ast.Add):
                yield left
            if isinstance(operator, ast.Mult | ast.BitAnd | ast.BitOr):
                yield right
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            yield operand
        case ast.Constant(value=bool(value)):
            yield with_(value=not value)
        case ast.Constant(value=int(value)):
            yield with_(value=value + 1)
        case ast.Constant(value=float(value)):
            yield with_(value=value * (1 + 2.0 ** (-20 if same_bits else -7)) if value else 1.0)
        case ast.Name(id=name):
            names = {x.id for x in ast.walk(scope) if isinstance(x, ast.Name)}
            for pair in CONFUSED:
                if name in pair and names.issuperset(pair):
                    yield with_(id=pair[1 - pair.index(name)])
        case ast.Call(func=ast.Attribute(value=value, attr=function), args=arguments, keywords=keywords):
            if function in FUNCTIONS and isinstance(value, ast.Name):
                yield with_(func=ast.Attribute(value, FUNCTIONS[function], ast.Load()))
            if function == "to":
                yield value
            if function == "cdiv":
                yield ast.BinOp(arguments[0], ast.FloorDiv(), arguments[1])
            if function == "program_id" and isinstance(arguments[0], ast.Constant):
                yield with_(args=[ast.Constant(1 if arguments[0].value == 0 else 0)])
            if function == "fma":
                a, b, c = arguments
                yield with_(args=[a, b, ast.UnaryOp(ast.USub(), c)])
                yield with_(args=[a, c, b])
                if same_bits:
                    yield ast.BinOp(ast.BinOp(a, ast.Mult(), b), ast.Add(), c)
            if function == "dot" and len(arguments) == 3:
                yield with_(args=arguments[:2])
            if function in SWAPPED:
                i, j = SWAPPED[function]
                order = list(arguments)
                order[i], order[j] = order[j], order[i]
                yield with_(args=order)
            if any(each.arg == "mask" for each in keywords):
                yield with_(keywords=[each for each in keywords if each.arg not in ("mask", "other")])
            if any(each.arg == "other" and ast.unparse(each.value) not in ("0", "0.0") for each in keywords):
                yield with_(keywords=[each for each in keywords if each.arg != "other"])


# --------------------------------------------------------------------------------------------------- changes of the PTX


def code_of(text: str) -> str:
    """A digest of PTX without comments and places in the source."""
    instructions = re.sub(r"(?m)^\s*(\.loc|\.file|//).*$|//.*$|\.section(.|\n)*", "", text)
    return hashlib.sha256("\n".join(instructions.split()).encode()).hexdigest()[:16]


def ptx_mutants(kernel: str, source: str, texts: list[str]) -> Iterator[Mutant]:
    """Every mutant of each kernel: a barrier or wait of the form that has most; a line's compares in every form."""
    forms: dict[str, list[str]] = {}
    for text in sorted(set(texts), key=lambda text: (-len(re.findall(r"bar\.sync|cp\.async\.wait_group", text)), text)):
        found = re.search(r"\.entry\s+(\w+)", text)
        assert found is not None
        if f"def {found[1]}(" in source:
            forms.setdefault(found[1], []).append(text)
    for entry, (text, *others) in sorted(forms.items()):
        for what, pattern in (("barrier", r"bar\.sync\s+0;"), ("wait", r"cp\.async\.wait_group\s+\d+;")):
            matches = list(re.finditer(pattern, text))
            for i, match in enumerate(matches):
                name = f"{entry}: ptx, {what} {i + 1} of {len(matches)} => dropped"
                yield Mutant(kernel, name, ptx=((text, text[: match.start()] + text[match.end() :]),))
        changed: dict[str, list[tuple[str, str]]] = {}
        for form in (text, *others):
            lines = form.splitlines(keepends=True)
            for place, compares in _compares(kernel, source, form).items():
                new = [
                    re.sub(r"(?<=setp\.)\w\w", lambda found: OTHERS[found[0]], each) if at in compares else each
                    for at, each in enumerate(lines)
                ]
                changed.setdefault(place, []).append((form, "".join(new)))
        for place, forms_of in sorted(changed.items()):
            yield Mutant(kernel, f"{entry}: ptx, compares of: {place} => lt for le", ptx=tuple(forms_of))


def _compares(kernel: str, source: str, text: str) -> dict[str, list[int]]:
    """The lines of PTX that compare integers by order, by the line of the kernel's source that they come from."""
    ours = [found[1] for found in re.finditer(r'\.file\s+(\d+)\s+"(.*)"', text) if Path(found[2]).stem == kernel]
    place, compares = "", dict[str, list[int]]()
    for at, instruction in enumerate(text.splitlines()):
        if found := re.match(r"\s*\.loc\s+(\d+)\s+(\d+)", instruction):
            place = source.splitlines()[int(found[2]) - 1].strip() if found[1] in ours else "the library"
            if found[2] == "0":
                place = "no line"
        elif re.search(r"setp\.(lt|le|gt|ge)\.[su]\d", instruction):
            compares.setdefault(place, []).append(at)
    return compares


# --------------------------------------------------------------------------------------------------------------- trials


class Judge:
    """A plugin of pytest that notes why a test failed; and a `load` of PTX that notes or changes it."""

    def __init__(self, mutant: Mutant | None, load: Callable[[str], Any]) -> None:
        self.verdict: dict[str, Any] = {"outcome": "survived", "ptx": [], "code": []}
        self._mutant, self._load = mutant, load

    def load(self, text: str) -> Any:
        self.verdict["code"].append(code_of(text))
        if self._mutant is None:
            self.verdict["ptx"].append(text)
        else:
            text = dict(self._mutant.ptx).get(text, text)
        return self._load(text)

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        """The first case of every test, then every second one, and so on: most faults show in some test's first."""
        seen: Counter[str] = Counter()
        turns = {}
        for item in items:
            seen[item.originalname] += 1
            turns[item] = seen[item.originalname]
        items.sort(key=turns.__getitem__)

    def pytest_exception_interact(self, node: Any, call: Any, report: Any) -> None:
        error = call.excinfo.value
        is_invalid = type(error).__name__ in ("CompilationError", "PTXASError") or "PassManager" in str(error)
        self.verdict["outcome"] = "invalid" if is_invalid else "killed"
        self.verdict["by"] = f"{getattr(node, 'name', '?')}: {type(error).__name__}"


def _child(mutant: Mutant | None, kernel: str, folder: Path) -> None:
    """In a process of its own: put the mutant in its module's place and run the tests."""
    os.setsid()
    log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    import importlib.util

    import pytest
    from gpu_without_gpu import driver
    from gpu_without_gpu.program import load

    import octavo.kernels.gpu

    if mutant is not None and mutant.source:
        os.environ["TRITON_CACHE_DIR"] = str(folder / "cache")
        name = f"octavo.kernels.gpu.{kernel}"
        path = folder / f"{kernel}.py"
        path.write_text(mutant.source)
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        setattr(octavo.kernels.gpu, kernel, module)
    judge = Judge(mutant, load)
    vars(driver)["load"] = judge.load
    options = "-x -p no:cacheprovider -p no:hypothesispytest --assert plain --timeout 0 --rootdir".split()
    options += [str(ROOT), "-m", "not slow"]
    code = pytest.main([*TESTS[kernel], *options], plugins=[judge])
    if code not in (0, 1):
        judge.verdict |= {"outcome": "invalid", "by": f"pytest ended with {code}"}
    (folder / "verdict").write_text(json.dumps(judge.verdict))


class Trial:
    """A mutant's tests, under way."""

    def __init__(self, mutant: Mutant | None, kernel: str) -> None:
        self.mutant, self.kernel, self.begin = mutant, kernel, time.monotonic()
        self._folder = Path(tempfile.mkdtemp(prefix="mutant-"))
        self.pid = os.fork()
        if self.pid == 0:
            try:
                _child(mutant, kernel, self._folder)
            except BaseException as error:  # a module that cannot be loaded
                (self._folder / "verdict").write_text(json.dumps({"outcome": "invalid", "by": repr(error)}))
            sys.stdout.flush()
            os._exit(0)

    def finish(self, deadline: float) -> dict[str, Any] | None:
        """The verdict, or None while it is not known."""
        ended, _ = os.waitpid(self.pid, os.WNOHANG)
        seconds = round(time.monotonic() - self.begin, 1)
        if not ended and seconds < deadline:
            return None
        if not ended:
            os.killpg(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        verdict = {"outcome": "killed", "by": "crash" if ended else "timeout"}
        if (self._folder / "verdict").exists():
            verdict = json.loads((self._folder / "verdict").read_text())
        self.log = (self._folder / "log").read_text() if (self._folder / "log").exists() else ""
        shutil.rmtree(self._folder, ignore_errors=True)
        return verdict | {"seconds": seconds}

    def wait(self, deadline: float) -> dict[str, Any]:
        while (verdict := self.finish(deadline)) is None:
            time.sleep(0.05)
        return verdict


def sampled(mutants: list[Mutant], count: int | None, seed: int) -> list[Mutant]:
    """Some of the mutants, which do not change when others come and go."""
    ranked = sorted(mutants, key=lambda mutant: hashlib.sha256(f"{seed} {mutant.name}".encode()).digest())
    return ranked[:count]


def explanations() -> list[tuple[str, str, str]]:
    """Kernel, pattern of a mutant's name, and why no test can tell such a mutant from the kernel."""
    blocks = EXPLAINED.read_text().split("\n\n")
    found = []
    for block in blocks:
        lines = [line for line in block.splitlines() if line and not line.startswith("#")]
        kernel = lines[0].rstrip(":") if lines else ""
        names = [line.removeprefix("  ") for line in lines[1:] if line.startswith("  ")]
        reason = " ".join(line for line in lines[1:] if not line.startswith("  "))
        found += [(kernel, name, reason) for name in names]
    return found


def matches(name: str, pattern: str) -> bool:
    """Whether a mutant's name is that of the pattern, in which * stands for anything."""
    return re.fullmatch(".*".join(map(re.escape, pattern.split("*"))), name) is not None


def explained(kernel: str, name: str) -> str | None:
    """Why a mutant may survive."""
    for of, pattern, reason in explanations():
        if of == kernel and matches(name, pattern):
            return reason
    return None


def _key(kernel: str) -> str:
    """A digest of all that a verdict depends on."""
    import triton

    tests = ROOT / "tests"
    paths = [*KERNELS.glob("*.py"), *(tests / "gpu_without_gpu").glob("*.py"), ROOT / TESTS[kernel][0]]
    paths += [tests / "gpu" / "conftest.py", tests / "gpu" / "packed_4bit.py"]
    content = b"".join(path.read_bytes() for path in sorted(paths)) + triton.__version__.encode()
    return hashlib.sha256(content).hexdigest()[:12]


def _unchanged(kernel: str, kept: Path) -> dict[str, Any]:
    """The verdict on the kernel as it is, with the PTX that its tests run; it is kept in a file."""
    if kept.exists():
        return dict(json.loads(kept.read_text()))
    trial = Trial(None, kernel)
    verdict = trial.wait(600)
    if verdict["outcome"] != "survived":
        raise SystemExit(f"{kernel}: its tests fail without a change\n{trial.log}")
    kept.write_text(json.dumps(verdict))
    return verdict


def run(kernel: str, count: int | None, seed: int, jobs: int, only: list[str], results: Path) -> list[dict[str, Any]]:
    """The verdicts on a kernel's mutants, those that are known already included."""
    source = (KERNELS / f"{kernel}.py").read_text()
    key = _key(kernel)
    known = {}
    if results.exists():
        for entry in map(json.loads, results.read_text().splitlines()):
            if entry["kernel"] == kernel and entry.get("key") == key:
                known[entry["name"]] = entry

    verdict = _unchanged(kernel, results.with_suffix("") / f"{kernel}-{key}.json")
    deadline = 20 + 4 * float(verdict["seconds"])
    mutants = list(source_mutants(kernel, source, kernel in SAME_BITS))
    from_ptx = list(ptx_mutants(kernel, source, verdict["ptx"]))
    if only:
        mutants, from_ptx = [[x for x in some if any(part in x.name for part in only)] for some in (mutants, from_ptx)]
    chosen = sampled(mutants, count, seed) + sampled(from_ptx, count and (count + 1) // 2, seed)
    print(
        f"{kernel}: {len(chosen)} of {len(mutants)} + {len(from_ptx)} mutants, {verdict['seconds']} s without one",
        flush=True,
    )

    found, waiting, running = [], [each for each in chosen if each.name not in known], list[Trial]()
    found += [known[each.name] for each in chosen if each.name in known]
    while waiting or running:
        while waiting and len(running) < jobs:
            running.append(Trial(waiting.pop(0), kernel))
        for trial in list(running):
            if (verdict_of := trial.finish(deadline)) is not None:
                running.remove(trial)
                assert trial.mutant is not None
                verdict_of.pop("ptx", None)
                is_same = verdict["code"] and verdict_of.pop("code", None) == verdict["code"]
                if verdict_of["outcome"] == "survived" and trial.mutant.source and is_same:
                    verdict_of["outcome"] = "same code"
                entry = {"kernel": kernel, "name": trial.mutant.name, "key": key, **verdict_of}
                found.append(entry)
                with results.open("a") as file:
                    file.write(json.dumps(entry) + "\n")
                print(
                    f"  {entry['outcome']:8} {entry['seconds']:5} {entry['name']}  [{entry.get('by', '')}]", flush=True
                )
        time.sleep(0.02)
    return found


def table(found: list[dict[str, Any]]) -> str:
    """Markdown: how many of which kernel's mutants were killed."""
    lines = [
        "| kernel | mutants | killed | equivalent | missed | killed of all but equivalent |",
        "|---|---|---|---|---|---|",
    ]
    rows: dict[str, Counter[str]] = {}
    for entry in found:
        outcome = entry["outcome"]
        if outcome == "survived" and explained(entry["kernel"], entry["name"]):
            outcome = "explained"
        for row in (entry["kernel"], "all"):
            rows.setdefault(row, Counter())[outcome] += 1
    for row in [name for name in rows if name != "all"] + ["all"] * bool(rows):
        count = rows[row]
        killed, equivalent, missed = count["killed"], count["same code"] + count["explained"], count["survived"]
        share = f"{100 * killed / max(killed + missed, 1):.1f} %"
        lines.append(f"| {row} | {killed + equivalent + missed} | {killed} | {equivalent} | {missed} | {share} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description="Mutation run over the Triton kernels.")
    parser.add_argument("kernels", nargs="*", help=f"of {', '.join(TESTS)}; all, if none is named")
    parser.add_argument("--sample", type=int, default=30, help="mutants of a kernel's source, and half as many of PTX")
    parser.add_argument("--all", action="store_true", help="every mutant: hours")
    parser.add_argument("--seed", type=int, default=0, help="which sample")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--only", action="append", default=[], help="only mutants whose names contain this; repeatable")
    parser.add_argument("--results", type=Path, default=RESULTS, help="what is known already; added to")
    parser.add_argument("--list", action="store_true", help="show the names of source mutants and run nothing")
    options = parser.parse_args()
    kernels = options.kernels or list(TESTS)
    if options.list:
        for kernel in kernels:
            for mutant in source_mutants(kernel, (KERNELS / f"{kernel}.py").read_text(), kernel in SAME_BITS):
                print(f"{kernel}: {mutant.name}")
        return 0

    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # PTX is judged where it is executed here, not on a GPU
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    os.chdir(ROOT)
    import gpu_without_gpu  # noqa: F401
    import pytest  # noqa: F401
    import torch

    import octavo.kernels.sample  # noqa: F401

    torch.set_num_threads(1)
    count = None if options.all else options.sample
    found: list[dict[str, Any]] = []
    folder = options.results.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["TRITON_CACHE_DIR"] = str(folder / "triton")
    for kernel in kernels:
        found += run(kernel, count, options.seed, options.jobs, options.only, options.results)
    print("\n" + table(found))
    missed = [
        entry for entry in found if entry["outcome"] == "survived" and not explained(entry["kernel"], entry["name"])
    ]
    for entry in missed:
        print(f"missed: {entry['kernel']}: {entry['name']}")
    if options.all and not options.only:
        survivors = [(entry["kernel"], entry["name"]) for entry in found if entry["outcome"] == "survived"]
        for kernel, pattern, _ in explanations():
            if kernel in kernels and not any(of == kernel and matches(name, pattern) for of, name in survivors):
                print(f"explains no survivor: {kernel}: {pattern}")
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
