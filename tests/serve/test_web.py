"""The page's files: served under the policy, whole by themselves, every control named. test_page.py uses them."""

from __future__ import annotations

import re
from html.parser import HTMLParser

from fastapi import FastAPI
from starlette.testclient import TestClient

from serve.page import FOLDER, POLICY, add_page

FILES = sorted(path.name for path in FOLDER.iterdir())
INDEX = (FOLDER / "index.html").read_text()
SCRIPTS = {name: (FOLDER / name).read_text() for name in FILES if name.endswith(".js")}
NAMESPACE = "http://www.w3.org/2000/svg"
CONTROLS = ("input", "select", "textarea", "progress")


class Elements(HTMLParser):
    """The start tags of a document, each with its attributes and whether a label is around it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None], bool]] = []
        self._labels = 0
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs), self._labels > 0))
        self._labels += tag == "label"

    def handle_endtag(self, tag: str) -> None:
        self._labels -= tag == "label"


ELEMENTS = Elements(INDEX).found
IDS = [attributes["id"] for _, attributes, _ in ELEMENTS if "id" in attributes]


def test_the_page_and_its_files_are_served_under_the_policy() -> None:
    app = FastAPI()
    add_page(app)
    client = TestClient(app)
    types = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
    assert client.get("/").text == INDEX
    for path in ("/", *(f"/web/{name}" for name in FILES)):
        answer = client.get(path)
        assert answer.status_code == 200, path
        assert answer.headers["content-security-policy"] == POLICY
        assert answer.headers["x-content-type-options"] == "nosniff"
        kind = "html" if path == "/" else path.rpartition(".")[2]
        assert answer.headers["content-type"].partition(";")[0] == types[kind]
        assert client.get(path, headers={"If-None-Match": answer.headers["etag"]}).status_code == 304
    for path in ("/web/missing.js", "/web/%2e%2e/api.py", "/web/..%2fapi.py", "/web/"):
        assert client.get(path).status_code == 404


def test_the_page_needs_nothing_from_elsewhere_and_nothing_that_the_policy_forbids() -> None:
    for name in FILES:
        text = (FOLDER / name).read_text().replace(NAMESPACE, "")
        assert not re.search(r"""https?:|@import|url\(|["'(]//""", text), name
    for tag, attributes, _ in ELEMENTS:
        assert "style" not in attributes, "the policy ignores inline styles"
        assert not [name for name in attributes if name.startswith("on")], "the policy blocks inline handlers"
        assert tag != "style"
        assert tag != "script" or "src" in attributes
        for name in attributes.keys() & {"src", "href"}:
            where = str(attributes[name])
            assert where.removeprefix("web/") in FILES or where.removeprefix("#") in IDS, where
    for name, text in SCRIPTS.items():
        for module in re.findall(r'^import .* from "(.+)";$', text, re.MULTILINE):
            assert module.removeprefix("./") in FILES, name


def test_every_control_has_a_name_and_every_reference_its_element() -> None:
    assert len(IDS) == len(set(IDS))
    labelled = [attributes["for"] for tag, attributes, _ in ELEMENTS if tag == "label" and "for" in attributes]
    assert len(labelled) == len(set(labelled))
    for tag, attributes, within_label in ELEMENTS:
        for name in attributes.keys() & {"for", "aria-labelledby", "aria-describedby"}:
            assert attributes[name] in IDS, f"{tag} {name}={attributes[name]}"
        if tag in CONTROLS and "id" in attributes:
            assert attributes["id"] in labelled or within_label or "aria-label" in attributes, attributes
    for name, text in SCRIPTS.items():
        for wanted in re.findall(r'(?:getElementById|element|field)\("([\w-]+)"\)', text):
            assert wanted in IDS, f"{name} looks for {wanted}"
