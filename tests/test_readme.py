"""The README's code runs as it stands."""

import re

from conftest import ROOT


def test_the_worked_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", readme, re.S)
    names = {}
    exec(code, names)
    assert (tmp_path / "adapter.pt").stat().st_size < 10_000
    x = names["torch"].randn(2, 4, 16, 16)
    names["torch"].testing.assert_close(names["plain"](x, None), names["model"](x, 999))
