"""A hostile card in a real browser: nothing of it runs, loads or leaves, at each of the two walls and behind both."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from qlformat.hub_server import card
from qlformat.hub_server.page_templates import HEADERS
from tests.local_hub.browser import SCRIPT_TIME, Canary, dom, listening, needs_chromium, screenshot
from tests.local_hub.page import Page
from tests.local_hub.publishing import push
from tests.local_hub_fixture import LocalHub, serve, write_tokens

pytestmark = [needs_chromium, pytest.mark.slow]

# Every way has a name of its own, so that a failure says which one was open.
HOSTILE = """---
license: mit
tags: ["<script>new Image().src='CANARY/yaml'</script>", '"><img src=x onerror="new Image().src=`CANARY/yaml2`">']
---
# Model <img src=x onerror="new Image().src='CANARY/heading'">

<script>new Image().src='CANARY/script'</script>
<script src="CANARY/script-src"></script>
<SCRIPT\t>new Image().src='CANARY/script-case'</SCRIPT >
<scr<script>ipt>new Image().src='CANARY/script-nested'</scr</script>ipt>
<img src="x" onerror="new Image().src='CANARY/onerror'">
<img src="CANARY/img-tracker">
<img src="//CANARYHOST/img-relative-scheme">
<img srcset="CANARY/srcset 1x">
<img src=`x` onerror=`new Image().src='CANARY/backtick'`>
<svg onload="new Image().src='CANARY/svg-onload'"><script>new Image().src='CANARY/svg-script'</script></svg>
<svg><image href="CANARY/svg-image"/><use href="CANARY/svg-use#x"/></svg>
<svg><style><img src=x onerror="new Image().src='CANARY/svg-style'"></style></svg>
<math><mtext><table><mglyph><style><!--</style>
<img title="--&gt;&lt;img src=x onerror=&quot;new Image().src='CANARY/mxss'&quot;&gt;">
</style></mglyph></table></mtext></math>

<noscript><p title="</noscript><img src=x onerror=&quot;new Image().src='CANARY/noscript'&quot;>"></noscript>
<textarea><img title="</textarea><img src=x onerror=&quot;new Image().src='CANARY/textarea'&quot;>"></textarea>
<template><img src=x onerror="new Image().src='CANARY/template'"></template>
<iframe src="CANARY/iframe"></iframe>
<iframe srcdoc="&lt;script&gt;new Image().src='CANARY/srcdoc'&lt;/script&gt;"></iframe>
<object data="CANARY/object"></object><embed src="CANARY/embed">
<video autoplay src="CANARY/video" onerror="new Image().src='CANARY/video-error'"></video>
<audio autoplay src="CANARY/audio"></audio>
<link rel="stylesheet" href="CANARY/link"><link rel="prefetch" href="CANARY/prefetch">
<style>@import "CANARY/import"; body { background: url(CANARY/style) }</style>
<div style="background: url(CANARY/style-attribute); position: fixed; inset: 0">over everything</div>
<body onload="new Image().src='CANARY/body-onload'" background="CANARY/background">
<meta http-equiv="refresh" content="0; url=CANARY/refresh">
<base href="CANARY/base/">
<form action="CANARY/form" id="f"><input autofocus onfocus="new Image().src='CANARY/onfocus'"><button>Go</button></form>
<details open ontoggle="new Image().src='CANARY/ontoggle'"><summary>more</summary>text</details>
<a href="javascript:void(new Image().src='CANARY/link-javascript')">one</a>
<a href="jav&#x09;ascript:void(new Image().src='CANARY/link-tab')">two</a>
<a href="&#1;javascript:void(new Image().src='CANARY/link-control')">three</a>
<a href="JaVaScRiPt&colon;new Image().src='CANARY/link-entity'">four</a>
<a href="data:text/html,<script>new Image().src='CANARY/link-data'</script>">five</a>
<a href="#x" onclick="new Image().src='CANARY/onclick'" onmouseover="new Image().src='CANARY/onmouseover'">six</a>
<a href="#x" ping="CANARY/ping">seven</a>

[eight](javascript:void(new%20Image().src='CANARY/markdown-javascript'))
[nine](<javascript:void(new Image().src='CANARY/markdown-angle')>)
[ten]: javascript:void(new%20Image().src='CANARY/markdown-reference')
[ten]
<javascript:void(new%20Image().src='CANARY/autolink')>
![eleven](CANARY/markdown-img)
![twelve](x"onerror="new&#32;Image().src='CANARY/markdown-quote')
[thirteen](x"onmouseover="new&#32;Image().src='CANARY/markdown-quote-link')

```html" onmouseover="new Image().src='CANARY/fence'
<script>new Image().src='CANARY/fence-body'</script>
```

<p id="main" class="skip note" title="a">THE-END</p>
"""

# Does what a reader could do: opens, hovers over, focuses and follows everything.
_READER = """
<script>
(async () => {
  for (const one of document.querySelectorAll("*")) {
    for (const kind of ["mouseover", "mouseenter", "focus", "toggle"]) one.dispatchEvent(new Event(kind));
  }
  for (const link of document.querySelectorAll("a")) {
    const stays = link.href.split("#")[0] === location.href.split("#")[0];
    if (stays || !/^https?:$/.test(link.protocol)) link.click();
    await new Promise(done => setTimeout(done, 20));
  }
  document.body.setAttribute("data-read", "yes");
})();
</script>
"""


def hostile(canary: Canary) -> str:
    return HOSTILE.replace("CANARYHOST", canary.url.removeprefix("http://")).replace("CANARY", canary.url)


@pytest.fixture(scope="module")
def canary() -> Iterator[Canary]:
    with listening() as heard:
        yield heard


@pytest.fixture
def quiet(canary: Canary) -> Iterator[Canary]:
    """A canary that has heard nothing yet, and must have heard nothing at the end."""
    canary.heard.clear()
    yield canary
    assert canary.heard == []


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("chromium")


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory, canary: Canary) -> Iterator[LocalHub]:
    place = tmp_path_factory.mktemp("hub")
    with serve(place / "root", token_file=write_tokens(place / "tokens")) as running:
        script = f"<script>new Image().src='{canary.url}/in-a-file'</script>"
        shape = "<rect fill='#0a0' style='fill:#00f' width='90' height='40'/>"
        svg = f"<svg xmlns='http://www.w3.org/2000/svg' width='90' height='40'>{shape}{script}</svg>"
        files = {
            "README.md": hostile(canary) + "\n![drawn](evil.svg)\n",
            "docs/evil.md": hostile(canary),
            "evil.svg": svg,
        }
        push(running, "mallory/model", files, title=script)
        yield running


def test_the_ways_are_open_without_the_walls(canary: Canary, profile: Path) -> None:
    """What the other tests forbid does happen where nothing forbids it; otherwise they would prove nothing."""
    canary.heard.clear()
    from markdown_it import MarkdownIt

    body = MarkdownIt("commonmark", {"html": True}).enable("table").render(hostile(canary))
    without_refresh = re.sub(r"<(?:meta|base|iframe|template|textarea|noscript)\b.*", "", body)
    canary.pages["/open"] = ({"Content-Type": "text/html"}, (f"<!doctype html>{without_refresh}{_READER}").encode())
    dom(profile, f"{canary.url}/open", SCRIPT_TIME)
    ways = {path.strip("/") for path in canary.heard}
    assert {"script", "script-src", "onerror", "img-tracker", "heading", "svg-script", "style", "object"} <= ways
    assert {"ontoggle", "onmouseover", "link-javascript"} <= ways


def test_the_sanitiser_alone(quiet: Canary, profile: Path) -> None:
    body = card.render(card.body(hostile(quiet).encode()), card.Addresses("/f", "/c"))
    quiet.pages["/clean"] = ({"Content-Type": "text/html"}, f"<!doctype html><div>{body}</div>{_READER}".encode())
    for path in ("/c/x", "/f/x", "/c/%60x%60"):
        quiet.pages[path] = ({"Content-Type": "text/plain"}, b"")
    found = dom(profile, f"{quiet.url}/clean", SCRIPT_TIME)
    assert 'data-read="yes"' in found and "THE-END" in found


def test_the_policy_alone(quiet: Canary, profile: Path) -> None:
    """The headers of the pages around the card as it came."""
    from markdown_it import MarkdownIt

    body = MarkdownIt("commonmark", {"html": True}).render(hostile(quiet)).replace('http-equiv="refresh"', "")
    quiet.pages["/policy"] = ({"Content-Type": "text/html", **HEADERS}, f"<!doctype html><p>{body}".encode())
    quiet.pages["/x"] = ({"Content-Type": "text/plain"}, b"")
    # This canary is the pages' own origin here: what the policy lets through is a picture of the origin itself.
    found = dom(profile, f"{quiet.url.replace('127.0.0.1', 'localhost')}/policy")
    assert "THE-END" in found


@pytest.mark.parametrize("path", ["/mallory/model", "/mallory/model/blob/main/docs/evil.md"])
def test_the_real_page(hub: LocalHub, quiet: Canary, profile: Path, path: str) -> None:
    found = dom(profile, hub.url + path)
    read = Page(found)
    assert read.dangers == [] and read.duplicates == []
    assert "THE-END" in found and found.count("<h1") == 1 and 'href="/mallory/model/tree/main"' in found


def test_a_picture_opened_by_itself(hub: LocalHub, quiet: Canary, profile: Path) -> None:
    assert "<rect" in dom(profile, f"{hub.url}/mallory/model/raw/main/evil.svg")


def test_screenshots(hub: LocalHub, quiet: Canary, profile: Path, tmp_path: Path) -> None:
    """The card is drawn with its own picture, and nothing of it covers the page's head."""
    from PIL import Image

    screenshot(profile, f"{hub.url}/mallory/model", tmp_path / "page.png", 1200, 3200)
    with Image.open(tmp_path / "page.png") as picture:
        colors = {color: count for count, color in picture.convert("RGB").getcolors(1 << 20) or ()}
        head = picture.convert("RGB").crop((0, 0, 1200, 40)).getcolors(1 << 16) or []
    assert colors.get((0, 0, 255), 0) > 3000, "evil.svg is a blue rectangle of 90 x 40 pixels"
    assert max(head)[1] == (255, 255, 255)
