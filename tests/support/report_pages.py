"""Workspaces with records, and the report page that they give."""

from __future__ import annotations

import re
from html.parser import HTMLParser

from conftest import PROJECT

from utils.core.config_file import load_config
from utils.evaluation.report import report_page, report_sources
from utils.predictions import catalog
from utils.predictions.store import Store

CONFIG = load_config(PROJECT / "configs" / "votes.yaml")


VOID = {"meta", "link", "br", "img", "hr", "wbr"}


class Page(HTMLParser):
    """Elements, headings and text of a page; fails where tags do not match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" in self.open:
            return
        if self.elements and self.elements[-1][0] == "wbr" and self.words:
            self.words[-1] += data  # one word, which may be broken there
        else:
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))

    def of(self, tag: str) -> list[dict]:
        return [facts for name, facts in self.elements if name == tag]


def page_of(workspace, split: str = "test") -> Page:
    return Page(workspace.report(split).read_text(encoding="utf-8"))


def write_page(workspace, config=CONFIG, split: str = "test"):
    """Write the page of the records that a workspace holds; return its path."""
    store = Store(config, workspace, catalog.read(workspace))
    return report_page.write(config, report_sources.read(store, split))
