import base64
from html.parser import HTMLParser

from rankflow.ablation.report.contents import compose
from rankflow.ablation.report.document import Bullets, Heading, Paragraph, Picture, Table
from rankflow.ablation.report.html import render_html

VOID = {"meta", "img"}


class Reader(HTMLParser):
    """Reads a page, and fails where tags are not closed in order."""

    def __init__(self, page):
        super().__init__()
        self.open, self.tags, self.attributes, self.words = [], [], [], []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    def values(self, tag, name):
        return [value for t, n, value in self.attributes if (t, n) == (tag, name)]


def test_a_whole_report_is_well_formed_and_needs_no_other_file(draw):
    scenario = draw(ranks=(1, 2), tasks={"clinc": 0.5}, seeds=2)
    spec, results = scenario.spec, scenario.results()
    document = compose(spec, results, {})
    page = Reader(render_html(document, "Ablation"))
    pictures = [block for block in document if isinstance(block, Picture)]
    sources = page.values("img", "src")
    assert [base64.b64decode(s.removeprefix("data:image/png;base64,")) for s in sources] == [
        picture.png for picture in pictures
    ]
    assert page.tags.count("table") == sum(isinstance(block, Table) for block in document)
    assert not {"link", "script", "iframe"} & set(page.tags)
    assert all(link.startswith("#") for link in page.values("a", "href"))
    assert "url(" not in "".join(page.words)


def test_contents_point_at_sections_and_no_two_anchors_are_alike():
    document = [Heading(2, "Tuning"), Heading(2, "Tuning"), Heading(3, "A & B")]
    page = Reader(render_html(document, "x"))
    anchors = page.values("h2", "id")
    assert len(set(anchors)) == 2
    assert [f"#{anchor}" for anchor in anchors] == page.values("a", "href")


def test_texts_are_escaped():
    document = [
        Heading(1, "<h>"),
        Paragraph("a < b & c", lead="<l>"),
        Bullets((Paragraph("<i>"),)),
        Table(("<c>",), (("<t>",),), notes=("<n>",)),
        Picture("<p>", "<f>", b""),
    ]
    page = Reader(render_html(document, "<title>"))
    words = "".join(page.words)
    for text in ("<h>", "a < b & c", "<l>", "<i>", "<c>", "<t>", "<n>", "<f>", "<title>"):
        assert text in words
    assert page.values("img", "alt") == ["<p>"]


def test_what_stands_out_is_strong_and_numbers_are_set_right():
    table = Table(("name", "value"), (("a", "1"),), strong=frozenset({(0, 1)}))
    page = render_html([table], "x")
    assert '<tr><td class="left">a</td><td><strong>1</strong></td></tr>' in page


def test_it_follows_the_readers_choice_of_light_and_dark():
    page = render_html([], "x")
    assert "color-scheme: light dark" in page
    assert "prefers-color-scheme: dark" in page
