"""The documentation names files that exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("document", ["README.md", "docs/structure.md", "benchmarks/README.md"])
def test_named_files_exist(document: str) -> None:
    text = (ROOT / document).read_text()
    paths = re.findall(r"`((?:server|models|kernels|tests|benchmarks|octavo|docs)/[\w/.]*)`", text)
    paths += re.findall(r"\]\((?!https?:)([^)#]+)\)", text)
    assert document == "benchmarks/README.md" or paths
    for path in paths:
        assert (ROOT / path).exists() or (ROOT / document).parent.joinpath(path).exists(), f"{document} names {path}"
