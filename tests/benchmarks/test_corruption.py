"""The campaign of flipped bits: what it counts, on a handful of flips."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from octavo.benchmarks.corruption import SITES, Outcome, main, table


def test_flips_are_counted_and_a_log_is_gone_on_with(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "log"
    model = str(tiny_checkpoint("llama2"))
    for flips in (2, 3):
        assert main([model, "--flips", str(flips), "--log", str(log), "--clean-steps", "200"]) == 0
        outcomes = [Outcome(**json.loads(line)) for line in log.read_text().splitlines()]
        assert sorted((o.site, o.number) for o in outcomes) == sorted((s, i) for s in SITES for i in range(flips))
    assert all(o.detector for o in outcomes if o.site == "weights")
    assert not any(o.wrong and not (o.detector or o.audited) for o in outcomes)
    text = capsys.readouterr().out
    assert table(outcomes) in text and "clean steps on 1 ranks: no false alarm" in text


def test_the_table() -> None:
    outcomes = [
        Outcome(0, "kv", 2, 16, 1, detector="kv", wrong=2),
        Outcome(1, "kv", 2, 16, 0, detector="kv"),
        Outcome(2, "kv", 2, 16, 0),
        Outcome(0, "logits", 2, 16, 0, wrong=1, audited=True),
        Outcome(1, "logits", 2, 16, 0, wrong=1),
        Outcome(0, "weights", 1, 16, 0, detector="finite"),
    ]
    assert table(outcomes).splitlines()[2:] == [
        "| 1 | - | weights | 1 | 0 | finite 1 | 0 | 0 | 0 |",
        "| 2 | 16 steps | kv | 3 | 1 | kv 2 | 1 | 0 | 0 |",
        "| 2 | 16 steps | logits | 2 | 0 | - | 0 | 2 | 1 |",
    ]
