"""The pages of the hub, from a server in a process of its own."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Iterator
from importlib import resources
from itertools import chain
from pathlib import Path
from urllib.parse import quote, urlencode

import pytest

from qlformat.hub_server import card, page_parts, page_templates
from qlformat.hub_server.index import File
from tests.local_hub.page import Page
from tests.local_hub.publishing import Answer, ask, create, push
from tests.local_hub_fixture import READ_TOKEN, LocalHub, serve, write_tokens

BASE = "ab" * 32
OTHER = "cd" * 32
WEIGHTS = b"the adapter's weights"
CARD = """---
license: apache-2.0
base_model: lab/source
base_model_relation: quantized
language: [en]
tags: [nf4, "<b>bold</b>"]
---
# The base

See [usage](#how-to-use), [notes](docs/notes.md), [the site](https://example.org/), [out](../../lab/secret).

![errors](docs/error.svg) ![elsewhere](https://example.org/x.png)

## How to use

| layer | error |
|:--|--:|
| 0 | 0.09 |
"""


def manifest(fingerprint: str, source: str | None) -> str:
    """The head of a base's qlf.json, and a list of weights as the writer lays it out."""
    head = {
        "kind": "base",
        "fingerprint": fingerprint,
        "recipe": {"quant_type": "nf4", "blocksize": 64, "double_quant": True},
    }
    head["source"] = {"repo_id": source, "revision": None, "files": []}
    lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
    return "{\n" + ",\n".join(lines) + ',\n  "weights": [\n    {"name": "w"}\n  ]\n}\n'


def adapter(fingerprint: str, base: str | None, revision: str | None = None) -> dict[str, str | bytes | None]:
    pin = {"repo_id": base, "revision": revision, "fingerprint": fingerprint}
    return {
        "adapter_config.json": "{}",
        "adapter_model.safetensors": WEIGHTS + fingerprint.encode(),
        "qlf.json": json.dumps({"format_version": 1, "kind": "adapter", "base": pin}),
    }


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalHub]:
    place = tmp_path_factory.mktemp("pages")
    with serve(place / "root", token_file=write_tokens(place / "tokens")) as running:
        fill(running)
        yield running


def fill(hub: LocalHub) -> None:
    push(hub, "lab/source", {"README.md": "---\nlicense: apache-2.0\n---\n# Source\n", "config.json": "{}"})
    first = push(hub, "lab/base", {"README.md": CARD, "qlf.json": manifest(OTHER, "lab/source")}, title="Convert")
    files = {"qlf.json": manifest(BASE, "lab/source"), "docs/notes.md": "# Notes\n\n[up](../README.md)\n"}
    files |= {"docs/error.svg": "<svg xmlns='http://www.w3.org/2000/svg'/>", "docs/deep/a b#?.txt": "<i>text</i>\n"}
    push(hub, "lab/base", files, title="Convert again")
    push(hub, "lab/fits", adapter(BASE, "lab/base"))
    push(hub, "lab/older", adapter(OTHER, "lab/base", first))
    push(hub, "lab/differs", adapter("ef" * 32, "lab/base"))
    push(hub, "lab/mirrored", adapter(BASE, "elsewhere/base"))
    push(hub, "lab/private-adapter", adapter(BASE, "lab/base"), private=True)
    report = {
        "base": {"name": "lab/base", "fingerprint": BASE},
        "adapters": [{"name": "fits", "sha256": hashlib.sha256(WEIGHTS + BASE.encode()).hexdigest()}],
    }
    merged = "---\nbase_model: [lab/base, lab/fits]\nbase_model_relation: merge\n---\n# Merge\n"
    push(hub, "lab/merged", {"merge_report.json": json.dumps(report), "README.md": merged})
    push(hub, "lab/secret", {"README.md": "# Secret\n"}, private=True)
    push(hub, "lab/table", {"README.md": "# Rows\n", "rows.jsonl": "{}\n"}, type_="dataset")
    create(hub, "lab/empty")


def get(hub: LocalHub, path: str, *, token: str | None = None, cookie: str | None = None) -> Answer:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    headers |= {"Cookie": cookie} if cookie else {}
    return ask(hub, path, **headers)


def page(hub: LocalHub, path: str, *, token: str | None = None, cookie: str | None = None, status: int = 200) -> Page:
    answer = get(hub, path, token=token, cookie=cookie)
    assert answer.status == status, answer.text
    policy = answer.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "script" not in policy and "unsafe" not in policy
    assert answer.headers["X-Content-Type-Options"] == "nosniff" and answer.headers["Referrer-Policy"] == "same-origin"
    read = Page(answer.text)
    assert (read.dangers, read.duplicates, read.unlabelled, read.unclosed) == ([], [], [], [])
    assert answer.text.count("<h1") == 1 and '<html lang="en">' in answer.text
    return read


def names(read: Page) -> list[str]:
    """The repositories listed."""
    return [address[1:] for address, text in read.links if "/" in text and address.startswith(("/lab/", "/datasets/"))]


def sign_in(hub: LocalHub, token: str, target: str = "/", **headers: str) -> Answer:
    form = urlencode({"token": token, "next": target}).encode()
    return ask(hub, "/-/sign-in", method="POST", body=form, **headers)


def test_the_list(hub: LocalHub) -> None:
    read = page(hub, "/")
    assert names(read)[:3] == ["lab/empty", "datasets/lab/table", "lab/merged"]
    assert "lab/merged" in names(read) and not {"lab/secret", "lab/private-adapter"} & set(names(read))
    assert "from lab/source · " not in read.text and "from lab/source" in read.text and "4-bit base" in read.text
    assert names(page(hub, "/?type=datasets")) == ["datasets/lab/table"]


@pytest.mark.parametrize(
    ("query", "found"), [("AS", ["lab/base"]), ("fits", ["lab/fits"]), ("secret", []), ("100%_", []), ("'; --", [])]
)
def test_search_by_name(hub: LocalHub, query: str, found: list[str]) -> None:
    read = page(hub, f"/?q={quote(query)}")
    assert names(read) == found
    assert found or "No repository that you may see" in read.text


def test_many_are_on_several_pages(tmp_path: Path) -> None:
    with serve(tmp_path / "root") as open_hub:
        for number in range(52):
            create(open_hub, f"lab/r{number:02}")
        first, second = page(open_hub, "/?q=r"), page(open_hub, "/?q=r&page=2")
        assert len(names(first)) == 50 and names(second) == ["lab/r01", "lab/r00"]
        assert "/?type=&q=r&page=2" in dict(first.links) and "Sign in" not in first.text
        for number in ("0", "-1", "x", "9" * 30, "²"):
            assert get(open_hub, f"/?page={quote(number)}").status == 200


def test_the_card(hub: LocalHub) -> None:
    answer = get(hub, "/lab/base")
    read = page(hub, "/lab/base")
    links = dict(read.links)
    assert links["#card-how-to-use"] == "usage" and 'id="card-how-to-use"' in answer.text
    assert links["/lab/base/blob/main/docs/notes.md"] == "notes" and links["https://example.org/"] == "the site"
    assert 'src="/lab/base/raw/main/docs/error.svg" alt="errors"' in answer.text
    assert '<img alt="elsewhere">' in answer.text and "example.org/x.png" not in answer.text
    assert "/lab/secret" not in links and '<a rel="nofollow noopener noreferrer">out</a>' in answer.text
    assert '<td align="right">0.09</td>' in answer.text
    assert "nf4, blocks of 64, double quantization" in read.text and BASE[:16] in read.text
    assert "<b>bold</b>" in read.text and "qlf pull lab/base base" in read.text and hub.url in read.text


def test_a_card_with_broken_metadata_says_so() -> None:
    """Commits of such a card are refused; one that is here anyway is shown with the reason."""
    content = b"---\nlicense: [mit\n---\n# Broken card\n"
    said = page_parts.problem_of(File("README.md", len(content), "", "", lfs=False), content)
    assert said.startswith("The metadata of README.md is not YAML: line 2")
    assert card.body(content) == "# Broken card\n"


def test_no_card_and_no_files(hub: LocalHub) -> None:
    assert "This repository has no card" in page(hub, "/lab/fits").text
    assert "Nothing was pushed yet" in page(hub, "/lab/empty").text
    assert "Branches main" in page(hub, "/lab/empty/refs").text
    assert "0 files 0 bytes" in page(hub, "/lab/empty/tree/main").text


def test_files_with_sizes(hub: LocalHub) -> None:
    read = page(hub, "/lab/base/tree/main")
    size = len(manifest(BASE, "lab/source"))
    assert f"qlf.json {size} bytes" in read.text and "docs/" in read.text and "3 files" in read.text
    assert "/lab/base/resolve/main/qlf.json" in dict(read.links)
    inner = page(hub, "/lab/base/tree/main/docs")
    assert "deep/ 12 bytes 1 file" in inner.text and "notes.md" in inner.text
    deep = dict(page(hub, "/lab/base/tree/main/docs/deep").links)
    address = "/lab/base/blob/main/docs/deep/a%20b%23%3F.txt"
    assert deep[address] == "a b#?.txt"
    assert "<i>text</i>" in page(hub, address).text
    assert "Notes" in page(hub, "/lab/base/blob/main/docs/notes.md").text
    assert "/lab/base/blob/main/README.md" in dict(page(hub, "/lab/base/blob/main/docs/notes.md").links)
    assert get(hub, "/lab/base/tree/main/qlf.json").headers["Location"] == "/lab/base/blob/main/qlf.json"
    page(hub, "/lab/base/tree/main/none", status=404)
    page(hub, "/lab/base/blob/main/none", status=404)


def test_pictures_come_from_here_and_cannot_act(hub: LocalHub) -> None:
    answer = get(hub, "/lab/base/raw/main/docs/error.svg")
    assert answer.headers["Content-Type"] == "image/svg+xml" and answer.body.startswith(b"<svg")
    assert answer.headers["Content-Security-Policy"].endswith("sandbox")
    again = ask(hub, "/lab/base/raw/main/docs/error.svg", If_None_Match=answer.headers["ETag"])
    assert again.status == 304 and again.body == b""
    page(hub, "/lab/base/raw/main/docs/notes.md", status=404)


def test_a_file_is_never_a_page(hub: LocalHub) -> None:
    push(hub, "lab/pages", {"evil.html": "<script>1</script>", "evil.svg": "<svg/>"})
    for name in ("evil.html", "evil.svg"):
        headers = get(hub, f"/lab/pages/resolve/main/{name}").headers
        assert (
            headers["Content-Disposition"].startswith("attachment") and headers["X-Content-Type-Options"] == "nosniff"
        )
        assert headers["Content-Security-Policy"] == "default-src 'none'; sandbox"


def test_history_branches_and_tags(hub: LocalHub) -> None:
    token = {"Authorization": f"Bearer {hub.token}", "Content-Type": "application/json"}
    first = json.loads(get(hub, "/api/models/lab/base/commits/main").body)[-2]["id"]
    body = json.dumps({"startingPoint": first}).encode()
    assert ask(hub, "/api/models/lab/base/branch/old%2Fone", method="POST", body=body, **token).status < 300
    body = json.dumps({"tag": "v1"}).encode()
    assert ask(hub, "/api/models/lab/base/tag/main", method="POST", body=body, **token).status < 300

    read = page(hub, "/lab/base/commits/main")
    assert re.search(r"Convert again .* ann .* Convert ", read.text)
    assert "Convert again" not in page(hub, f"/lab/base/commits/{first}").text
    change = page(hub, next(address for address, text in read.links if text == "Convert again"))
    assert "added docs/notes.md" in change.text and "changed qlf.json" in change.text and first[:12] in change.text
    refs = page(hub, "/lab/base/refs")
    assert "Branches main" in refs.text and "Tags v1" in refs.text
    assert dict(refs.links)["/lab/base/tree/old%2Fone"] == "old/one"
    for address in ("/lab/base/tree/old%2Fone", "/lab/base/tree/old/one", f"/lab/base/tree/{first[:8]}"):
        assert "docs/" not in page(hub, address).text
    page(hub, "/lab/base/tree/none", status=404)
    page(hub, "/lab/base/commits/main/extra", status=404)


def generations(hub: LocalHub, name: str, token: str | None = None) -> list[list[str]]:
    """The names of each generation, the oldest first."""
    text = get(hub, f"/{name}", token=token).text
    inner = text.partition('<ol class="lineage">')[2].partition("</ol>")[0]
    rows = [re.findall(r'class="name">(?:<a[^>]*>)?([^<]+)<', part) for part in inner.split("</ul>\n    </li>")]
    return [row for row in rows if row]


def test_lineage_from_source_to_merge(hub: LocalHub) -> None:
    adapters = ["lab/differs", "lab/fits", "lab/mirrored", "lab/older"]
    assert generations(hub, "lab/base") == [["lab/source"], ["lab/base"], adapters, ["lab/merged"]]
    whole = [["lab/source"], ["lab/base"], ["lab/fits"], ["lab/merged"]]
    assert generations(hub, "lab/fits") == whole == generations(hub, "lab/merged")
    assert generations(hub, "lab/source") == generations(hub, "lab/base")


def test_lineage_says_whether_pins_fit(hub: LocalHub) -> None:
    read = page(hub, "/lab/base")
    for name, said in {
        "fits": "adapter for lab/base ✓ same content",
        "mirrored": "adapter for lab/base ✓ same content",
        "older": "adapter for lab/base ○ an earlier commit",
        "differs": "adapter for lab/base ✗ content differs",
        "merged": "merged from lab/base ✓ same content merged from lab/fits ✓ same content",
    }.items():
        assert re.search(rf"lab/{name} +(adapter|merge) {re.escape(said)}", read.text), name


def test_lineage_does_not_tell_of_private_relatives(hub: LocalHub) -> None:
    assert "private-adapter" not in get(hub, "/lab/base").text
    seen = generations(hub, "lab/base", hub.token)
    assert "lab/private-adapter" in seen[2]
    push(hub, "lab/names-it", {"README.md": "---\nbase_model: lab/secret\n---\n"})
    push(hub, "lab/names-none", {"README.md": "---\nbase_model: lab/secrex\n---\n"})
    hidden, absent = (get(hub, f"/lab/names-{what}").text for what in ("it", "none"))
    assert "not on this hub" in hidden
    hide = {"names-none": "names-it", "secrex": "secret"}
    for old, new in hide.items():
        absent = absent.replace(old, new)
    commit = re.compile(r"[0-9a-f]{40}|[0-9a-f]{12}(?=</code>)")
    assert commit.sub("", hidden) == commit.sub("", absent)


def test_lineage_survives_circles_and_nonsense(hub: LocalHub) -> None:
    push(hub, "odd/one", {"README.md": "---\nbase_model: odd/two\n---\n"})
    push(hub, "odd/two", {"README.md": "---\nbase_model: [odd/one, odd/two, 7, null, no-namespace]\n---\n"})
    assert sorted(chain(*generations(hub, "odd/one"))) == ["odd/one", "odd/two"]
    for content in (
        "[",
        "[]",
        "null",
        '{"kind": "adapter", "base": 7}',
        '{"kind": "base", "recipe": [1], "fingerprint": {}}',
    ):
        push(hub, "odd/three", {"qlf.json": content, "merge_report.json": content, "README.md": "x"})
        page(hub, "/odd/three")


def test_a_private_repository_is_not_there(hub: LocalHub) -> None:
    paths = ["", "/tree/main", "/blob/main/README.md", "/raw/main/x.png", "/commits/main", "/refs"]
    for path in paths:
        hidden, absent = get(hub, f"/lab/secret{path}"), get(hub, f"/lab/absent{path}")
        assert hidden.status == absent.status == 404
        assert hidden.text.replace("lab/secret", "lab/absent") == absent.text
        assert hidden.headers["X-Error-Code"] == absent.headers["X-Error-Code"] == "RepoNotFound"
        assert get(hub, f"/lab/secret{path}", token="hf_wrong_0123456789abcdef").status == 404
    assert page(hub, "/lab/secret", token=READ_TOKEN).text.count("private") == 1
    assert "lab/secret" in names(page(hub, "/", token=READ_TOKEN))


def test_signing_in(hub: LocalHub) -> None:
    assert "Sign in" in page(hub, "/").text
    assert dict(page(hub, "/lab/secret", status=404).links)["/-/sign-in?next=/lab/secret"] == "Sign in"
    answer = sign_in(hub, READ_TOKEN, "/lab/secret")
    assert answer.status == 303 and answer.headers["Location"] == "/lab/secret"
    cookie = answer.headers["Set-Cookie"]
    assert "HttpOnly" in cookie and "SameSite=lax" in cookie and READ_TOKEN not in cookie
    cookie = cookie.partition(";")[0]
    assert "bob" in page(hub, "/lab/secret", cookie=cookie).text
    assert get(hub, "/lab/secret/resolve/main/README.md", cookie=cookie).body == b"# Secret\n"
    out = ask(hub, "/-/sign-out", method="POST", body=b"", Cookie=cookie)
    assert out.status == 303 and 'qlf_session=""' in out.headers["Set-Cookie"]
    page(hub, "/lab/secret", cookie=cookie, status=404)


def test_a_cookie_changes_nothing(hub: LocalHub) -> None:
    cookie = sign_in(hub, hub.token).headers["Set-Cookie"].partition(";")[0]
    body = json.dumps({"name": "by-cookie", "organization": "lab"}).encode()
    answer = ask(hub, "/api/repos/create", method="POST", body=body, Cookie=cookie, Content_Type="application/json")
    assert answer.status == 401 and get(hub, "/lab/by-cookie", token=hub.token).status == 404


def test_signing_in_is_refused(hub: LocalHub) -> None:
    wrong = sign_in(hub, "hf_wrong_0123456789abcdef")
    assert (
        wrong.status == 403
        and "does not know that token" in Page(wrong.text).text
        and "Set-Cookie" not in wrong.headers
    )
    assert "hf_wrong" not in wrong.text
    for origin in ("https://evil.example", "null"):
        assert sign_in(hub, READ_TOKEN, Origin=origin).status == 403
    assert sign_in(hub, READ_TOKEN, Origin=hub.url).status == 303
    assert sign_in(hub, "x" * 10_000).status == 413
    assert ask(hub, "/-/sign-out", method="POST", body=b"", Origin="https://evil.example").status == 403


@pytest.mark.parametrize(
    "target", ["https://evil.example/", "//evil.example", "/\\evil.example", "/a\r\nX: 1", "x", "/-/x"]
)
def test_signing_in_leads_nowhere_else(hub: LocalHub, target: str) -> None:
    assert sign_in(hub, READ_TOKEN, target).headers["Location"] == "/"


def test_the_api_answers_as_before(hub: LocalHub) -> None:
    for path in ("/api/nothing/x", "/api/models/lab/none", "/lab/base/nothing/main", "/x"):
        answer = get(hub, path)
        assert answer.status == 404 and "error" in json.loads(answer.body), path


def test_the_style_is_served_from_here_and_kept(hub: LocalHub) -> None:
    address = page_templates.asset("style.css")
    answer = get(hub, address)
    assert answer.headers["Content-Type"].startswith("text/css") and "immutable" in answer.headers["Cache-Control"]
    assert "url(" not in answer.text and "@import" not in answer.text
    assert get(hub, "/-/000000000000-style.css").status == get(hub, "/-/..%2fpages.py").status == 404


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_can_be_read(theme: str) -> None:
    """WCAG 2's contrast of at least 4.5 to 1, for every pair of colors that text is written in."""
    style = resources.files("qlformat.hub_server").joinpath("templates/style.css").read_text()
    colors = {}
    for block in re.findall(r":root \{(.*?)\}", style, re.DOTALL)[: 1 if theme == "light" else 2]:
        colors |= dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{3,6})", block))
    assert len(re.findall(r":root \{", style)) == 2
    pairs = [(text, back) for text in ("text", "muted", "link") for back in ("page", "surface", "raised")]
    pairs += [(f"{name}-text", name) for name in ("blue", "green", "violet", "amber", "red")]
    pairs += [(f"{name}-text", "surface") for name in ("green", "amber", "red")]
    for text, back in pairs:
        light, dark = sorted((luminance(colors[text]), luminance(colors[back])), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, (theme, text, back)


def luminance(color: str) -> float:
    digits = color[1:] if len(color) == 7 else "".join(2 * digit for digit in color[1:])
    parts = [int(digits[at : at + 2], 16) / 255 for at in (0, 2, 4)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


SLOW = {
    "links that are not closed": "[" * 400_000,
    "pictures that are not closed": "![" * 200_000,
    "links in links": "[a](<" * 80_000,
    "stars": "*a_" * 130_000,
    "elements in elements": "<div>" * 80_000,
    "quotes in quotes": ">" * 400_000,
    "backticks": "".join("`" * count + " " for count in range(880)),
    "references": "".join(f"[{number}]: /x\n" for number in range(30_000)),
}


@pytest.mark.parametrize("kind", SLOW)
def test_no_card_takes_long(kind: str) -> None:
    """Seconds of this process; without the bounds, the first takes a minute and the fifth 20 s."""
    started = time.process_time()
    card.render(card.body(SLOW[kind].encode()), card.Addresses("/f", "/c"))
    assert time.process_time() - started < 5


def test_a_card_that_is_too_long(hub: LocalHub) -> None:
    push(hub, "lab/long", {"README.md": "# Long\n" + "x " * card.MAX_BYTES})
    assert "too long to be shown" in page(hub, "/lab/long").text


def test_a_file_that_is_lost(tmp_path: Path) -> None:
    with serve(tmp_path / "root") as running:
        push(running, "lab/model", {"README.md": "# Lost\n", "config.json": "{}"})
        lost = [file for file in (tmp_path / "root" / "blobs").rglob("*") if file.is_file()]
        for file in lost:
            file.unlink()
        assert len(lost) == 2
        for path in ("/lab/model", "/lab/model/blob/main/config.json"):
            assert "cannot be read from the hub's store" in page(running, path, status=500).text
        page(running, "/lab/model/tree/main")


@pytest.mark.parametrize(
    ("content", "body"),
    [
        (b"---\na: b\n---\n# x", "# x"),
        (b"\xef\xbb\xbf---\r\na: b\r\n---\r\n# x", "# x"),
        (b"---\n---\n# x", "# x"),
        (b"# x\n---\na\n---\n", "# x\n---\na\n---\n"),
        (b"---\nnever closed", "---\nnever closed"),
        (b"\xff\x00", "\ufffd\ufffd"),
    ],
)
def test_the_body_of_a_card(content: bytes, body: str) -> None:
    assert card.body(content) == body
