"""The mutation run itself: a planted fault is killed, a change that means the same survives, and results are kept."""

import json
import os
import subprocess
import sys
from pathlib import Path

import mutate_kernels
import pytest
import torch

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1" or torch.cuda.is_available(),
    reason="mutants are judged by what the compiler emits, as it is executed without a GPU",
)
SOURCE = """
@triton.jit
def copy(x_ptr, y_ptr, n, stride, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at * stride, mask=at < n)
    tl.store(y_ptr + at, x, mask=at < n)

def launch(n):
    return n + 1
"""


def test_mutants_are_what_one_would_get_wrong() -> None:
    mutants = list(mutate_kernels.source_mutants("copy", SOURCE, same_bits=False))
    names = [mutant.name for mutant in mutants]
    assert len(names) == len(set(names)) == len({mutant.source for mutant in mutants})
    assert all(mutant.source.endswith(SOURCE[SOURCE.index("def launch") :]) for mutant in mutants)
    store = "tl.store(y_ptr + at, x, mask=at < n)"
    assert {
        f"copy: {store} => dropped",
        f"copy: {store} => tl.store(y_ptr + at, x)",
        f"copy: {store} => tl.store(y_ptr + at, x, mask=at <= n)",
        f"copy: {store} => tl.store(y_ptr - at, x, mask=at < n)",
        "copy: x = tl.load(x_ptr + at * stride, mask=at < n) => x = tl.load(x_ptr + at, mask=at < n)",
    } <= set(names)


def test_mutants_of_ptx() -> None:
    text = """.entry copy(
        .loc 1 3 5
        setp.lt.s32 %p1, %r1, %r2;
        bar.sync 0;
        cp.async.wait_group 1;
        .file 1 "/kernels/copy.py"
    """
    other = text.replace("bar.sync 0;", "")
    found = mutate_kernels.ptx_mutants("copy", "def copy(\nb\n c < d\n", [other, text, text.replace("copy", "library")])
    assert {mutant.name: dict(mutant.ptx) for mutant in found} == {
        "copy: ptx, barrier 1 of 1 => dropped": {text: text.replace("bar.sync 0;", "")},
        "copy: ptx, wait 1 of 1 => dropped": {text: text.replace("cp.async.wait_group 1;", "")},
        "copy: ptx, compares of: c < d => lt for le": {
            form: form.replace("setp.lt", "setp.le") for form in (text, other)
        },
    }


def test_samples_are_the_same_when_others_come() -> None:
    mutants = [mutate_kernels.Mutant("copy", f"mutant {i}") for i in range(50)]
    chosen = set(mutate_kernels.sampled(mutants, 10, seed=0))
    assert len(chosen) == 10 and chosen != set(mutate_kernels.sampled(mutants, 10, seed=1))
    more = set(mutate_kernels.sampled([*mutants, mutate_kernels.Mutant("copy", "another")], 10, seed=0))
    assert len(chosen & more) >= 9


def test_every_explanation_is_of_a_mutant() -> None:
    names = {
        kernel: [
            each.name
            for each in mutate_kernels.source_mutants(
                kernel, (mutate_kernels.KERNELS / f"{kernel}.py").read_text(), kernel in mutate_kernels.SAME_BITS
            )
        ]
        for kernel in mutate_kernels.TESTS
    }
    for kernel, pattern, reason in mutate_kernels.explanations():
        assert kernel in names and reason
        assert ": ptx, " in pattern or any(mutate_kernels.matches(name, pattern) for name in names[kernel]), pattern


@pytest.mark.parametrize("kernel", ["embedding"])
def test_a_fault_is_killed_and_an_equivalent_survives(kernel: str, tmp_path: Path) -> None:
    results = tmp_path / "results.jsonl"
    fault, equivalent = "=> inside = (row >= 0) & (row <= num_ids)", "=> token = tl.program_id(0)"
    command = [sys.executable, mutate_kernels.__file__, kernel, "--jobs", "2", "--results", str(results)]
    stale = {"kernel": kernel, "name": f"embedding_kernel: token = tl.program_id(0).to(tl.int64) {equivalent}"}
    results.write_text(json.dumps(stale | {"outcome": "killed", "key": "of what was before"}) + "\n")
    subprocess.run([*command, "--only", fault, "--only", equivalent], capture_output=True)
    found = {entry["name"].split(": ", 1)[1]: entry for entry in map(json.loads, results.read_text().splitlines())}
    outcomes = {name[name.index("=>") :]: entry["outcome"] for name, entry in found.items()}
    assert outcomes == {fault: "killed", equivalent: "survived"}
