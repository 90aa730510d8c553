"""The page: what is in it, and that a browser shows and filters it."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from gdnfuse.report.page import page
from gdnfuse.report.records import BlockReport, GraphReport, Operation, Record, Source, Status

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
VOID = {"meta", "link", "input", "circle", "path", "br"}
EVIL = "<script>alert('&\"')</script>"


class Checker(HTMLParser):
    """Every tag is closed where it should be, every id is there once, every link within the page leads somewhere."""

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.links, self.tags, self.text = [], [], [], [], []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append(tag)
        self.ids += [attrs["id"]] if "id" in attrs else []
        self.links += [attrs["href"]] if "href" in attrs else []
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.text.append(data)


def checked(html):
    checker = Checker()
    checker.feed(html)
    assert not checker.open and len(checker.ids) == len(set(checker.ids))
    for link in checker.links:
        assert link == "data:," or link.removeprefix("#") in checker.ids, link
    return checker


def refusing_report():
    """Two layers, one fused and one not, with names that a page must not take for its own."""
    source = Source("/x/model.py", 7, "forward", f"y = {EVIL}")
    refused = Record("swiglu_linear", "fuse", Status.REFUSED, "a", f"silu{EVIL}", reason=f"Must not be {EVIL}.", source=source)
    missed = Record(
        "gating", "lift", Status.UNMATCHED, "b", at="c", expected="neg", got="mul", reason="Expected neg at c, found mul."
    )
    refused.block, missed.block = "layers.0.mlp", "layers.1.mlp"
    operations = [Operation("a", EVIL, ["input 1", f"w{EVIL} f32[2]"], "f32[2]", 1, 16, source)]
    blocks = [
        BlockReport("layers.0.mlp", "layers.0", 0, "MLP", "partly", {"SwiGLU": "declined"}, 2, 1, 20, 10),
        BlockReport("layers.1.mlp", "layers.1", 1, EVIL, "unchanged", {"gates": "declined"}, 2, 2, 20, 20),
    ]
    return GraphReport(3, "decode", blocks=blocks, structures=[operations], records=[refused, missed])


def test_a_page_is_well_formed_escaped_and_needs_nothing_else(decode_report):
    html = page([decode_report, refusing_report()], {"model": EVIL, "batch": EVIL})
    found = checked(html)
    assert found.tags.count("script") == 1 and EVIL not in html
    assert "".join(found.text).count(EVIL) >= 7
    assert not re.search(r"https?:|src=|url\(|@import|fetch\(|import\(", html)
    assert found.tags.count("h1") == 1 and "svg" in found.tags


def test_a_page_shows_a_refusal_with_its_line_and_the_nearest_node():
    text = re.sub(r"\s+", " ", " ".join(checked(page([refusing_report()], {"model": "m"})).text))
    assert "model.py:7" in text and "Expected neg at c, found mul." in text
    assert re.search(r"matched down to c expected there neg found mul", text)


def test_sixty_four_layers_make_a_small_page(decode_report):
    blocks, first = [], decode_report.blocks[1:]
    for i in range(64):
        kind = first[-2:] if i % 4 == 3 else first[:2]
        blocks += [dataclasses.replace(b, index=i, layer=f"model.layers.{i}", path=re.sub(r"\d+", str(i), b.path)) for b in kind]
    html = page([dataclasses.replace(decode_report, blocks=[*blocks, decode_report.blocks[0]])], {"model": "m"})
    assert html.count("<tr ") == 129
    assert len(html.encode()) < 300_000
    checked(html)


def test_a_graph_without_layers_has_a_page():
    assert "no GDN layer" in page([GraphReport(0, inner="eager")], {"model": "m"})


CLICK = """
<script>
const before = document.querySelectorAll("tr[data-kind]:not([hidden])").length;
document.querySelector('input[value="linear attention"]').click();
const rows = Array.from(document.querySelectorAll("tr[data-kind]:not([hidden])"), (r) => r.dataset.kind);
const theme = document.getElementById("theme");
const colours = [getComputedStyle(document.body).backgroundColor];
theme.click();
colours.push(getComputedStyle(document.body).backgroundColor);
location.hash = document.querySelector("details:not([open])").id;
setTimeout(() => {
  const result = { before, rows, cells: document.querySelectorAll(".map a:not([hidden])").length, colours,
    shown: document.querySelector("output").textContent, opened: document.getElementById(location.hash.slice(1)).open,
    overflow: document.documentElement.scrollWidth - innerWidth, form: document.querySelector("form").hidden };
  document.body.append(Object.assign(document.createElement("pre"), { id: "result", textContent: JSON.stringify(result) }));
}, 100);
</script>
"""


def browse(file, *options):
    """The page's DOM after its scripts, and what the browser's console said."""
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--virtual-time-budget=3000"]
    command += ["--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={file.parent / 'profile'}", *options, file.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, re.findall(r".*:CONSOLE.*", done.stderr)


needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium, chromium-browser or google-chrome on the PATH")


@needs_chromium
@pytest.mark.timeout(300)
def test_a_browser_shows_filters_and_switches_the_theme(decode_report, tmp_path):
    file = tmp_path / "page.html"
    file.write_text(page([decode_report], {"model": "m"}).replace("</body>", f"{CLICK}</body>"), encoding="utf-8")
    dom, console = browse(file, "--window-size=900,700", "--dump-dom")
    assert console == []
    found = json.loads(re.search(r'<pre id="result">(.*?)</pre>', dom)[1])
    assert found["before"] == len(decode_report.blocks) == 7
    assert sorted(found["rows"]) == ["MLP", "MLP", "MLP", "full attention", "outside the layers"]
    assert found["cells"] == 5 and found["shown"] == "5 of 7 shown"
    assert len(set(found["colours"])) == 2
    assert found["opened"] is True and found["form"] is False and found["overflow"] <= 0


@needs_chromium
@pytest.mark.timeout(300)
def test_a_page_with_an_error_would_be_seen(tmp_path):
    file = tmp_path / "page.html"
    file.write_text(page([], {"model": "m"}).replace("</body>", "<script>missing()</script></body>"), encoding="utf-8")
    _, console = browse(file, "--dump-dom")
    assert len(console) == 1 and "missing is not defined" in console[0]
