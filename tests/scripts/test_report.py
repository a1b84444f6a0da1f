"""scripts/report.py: of a real run that was resumed, of several runs, in a real browser."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.programs import ROOT, environment, train

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
TITLES = ["Loss", "Throughput", "Time of the optimizer by phase", "Memory of each rank", "Learning rate"]
TITLES += ["Norm of the gradient"]


def report(*arguments: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "scripts/report.py", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=100)
    assert done.returncode == 0 or not check, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def metrics(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ranks for 8 steps, then one for 4 more."""
    folder = tmp_path_factory.mktemp("runs")
    flags = ("--save", folder / "checkpoints", "--auto-resume", "--metrics", folder / "run.jsonl")
    train(2, "--steps", 8, *flags)
    train(1, "--steps", 12, *flags)
    return folder / "run.jsonl"


def cells(page: str) -> list[list[str]]:
    return [re.findall(r"<td>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", page)[1:]]


def test_a_run_that_was_resumed(metrics: Path) -> None:
    report(metrics)
    page = metrics.with_suffix(".html").read_text()
    assert re.findall(r"<h2>(.*?)</h2>", page) == TITLES
    assert page.count("<svg role=") == 6
    assert not re.search(r"<script|src=|https?://(?!www\.w3\.org|purl\.org|creativecommons\.org|matplotlib\.org)", page)
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    (row,) = cells(page)
    last = [record for record in records if "loss" in record][-1]
    assert row[:5] == ["run", "sharded", "2, 1", "12", f"{last['loss']:.4f}"]
    figures = re.split(r"<figure>", page)[1:]
    for figure in figures:
        assert "1 ranks" in figure  # where it was resumed
    assert all(phase in figures[2] for phase in ("update", "all-gather", "other"))
    assert "run, rank 1" in figures[3]


def test_several_runs_torn_lines_and_wrong_files(metrics: Path, tmp_path: Path) -> None:
    other = tmp_path / "o<th>er.jsonl"
    lines = metrics.read_text().splitlines()
    other.write_text("\n".join(lines[:7]) + '\n{"step": 7, "lo')  # killed while it wrote
    report(metrics, other, "--output", tmp_path / "two.html")
    page = (tmp_path / "two.html").read_text()
    assert [row[0] for row in cells(page)] == ["run", html.escape("o<th>er")]
    assert cells(page)[1][3] == str(json.loads(lines[6])["step"])
    assert "o<th>er" not in page
    for text, message in (("\n".join([*lines[:2], "nothing", lines[3]]), "line 3: expected a JSON"), ("", "no steps")):
        (tmp_path / "wrong.jsonl").write_text(text)
        done = report(tmp_path / "wrong.jsonl", check=False)
        assert done.returncode == 1
        assert message in done.stderr


PROBE = """<script>
const box = element => element.getBoundingClientRect();
const shown = [...document.querySelectorAll("svg")].filter(svg => box(svg).width > 250 && box(svg).height > 120);
const texts = [...document.querySelectorAll("svg text")];
const outside = texts.filter(text => {
    const [inner, outer] = [box(text), box(text.closest("svg"))];
    return inner.left < outer.left - 1 || inner.right > outer.right + 1 || inner.bottom > outer.bottom + 1;
});
const columns = new Set([...document.querySelectorAll("figure")].map(figure => Math.round(box(figure).left))).size;
document.body.dataset.found = JSON.stringify({
    shown: shown.length, texts: texts.length, outside: outside.map(text => text.textContent), columns,
    overflows: document.documentElement.scrollWidth > window.innerWidth, width: window.innerWidth,
});
</script>"""


def browse(page: Path, width: int, folder: Path) -> dict[str, Any]:
    """What the browser has laid out, and a picture of it in the folder."""
    assert BROWSER is not None
    probed = folder / f"probed_{width}.html"
    probed.write_text(page.read_text().replace("</html>", PROBE + "</html>"))
    quiet = ["--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command = [
        BROWSER,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        *quiet,
        f"--user-data-dir={folder / 'profile'}",
    ]
    command += [f"--window-size={width},1400", f"--screenshot={folder / f'{width}.png'}", "--dump-dom"]
    done = subprocess.run([*command, probed.as_uri()], capture_output=True, text=True, timeout=100)
    found = re.search(r'data-found="(.*?)"', done.stdout)
    assert found, done.stderr
    return dict(json.loads(html.unescape(found[1])))


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
def test_in_a_browser(metrics: Path, tmp_path: Path) -> None:
    """All plots are there, with all of their text, side by side where there is room, and nothing sticks out."""
    report(metrics, "--output", tmp_path / "page.html")
    for width, columns in ((1300, 2), (600, 1)):
        found = browse(tmp_path / "page.html", width, tmp_path)
        assert found["shown"] == 6
        assert found["texts"] > 80
        assert found["outside"] == []
        assert found["columns"] == columns
        assert not found["overflows"]
        assert (tmp_path / f"{width}.png").stat().st_size > 20_000
