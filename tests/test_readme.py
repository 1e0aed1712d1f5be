"""The README's code runs as it stands."""
import re
from pathlib import Path

README = (Path(__file__).resolve().parents[1] / "README.md").read_text()


def test_the_worked_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    names = {}
    exec(code, names)
    assert (tmp_path / "adapter.pt").stat().st_size < 10_000
    x = names["torch"].randn(2, 4, 16, 16)
    names["torch"].testing.assert_close(names["plain"](x, None), names["model"](x, 999))


def test_no_number_is_left_open():
    assert not re.search(r"@[A-Z]+@", README)
