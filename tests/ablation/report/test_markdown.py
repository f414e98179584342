import pytest

from rankflow.ablation.report.document import Bullets, Heading, Paragraph, Picture, Table
from rankflow.ablation.report.markdown import render_markdown

TABLE = Table(("name", "value"), (("a", "1"), ("b", "2")), strong=frozenset({(1, 1)}), notes=("c",))


@pytest.mark.parametrize(
    ("block", "text"),
    [
        (Heading(3, "At rank 4"), "### At rank 4"),
        (Paragraph("one\n two"), "one two"),
        (Bullets((Paragraph("one", lead="A."), Paragraph("two"))), "- **A.** one\n- two"),
        (TABLE, "| name | value |\n| :-- | --: |\n| a | 1 |\n| b | **2** |\n\nc"),
        (Picture("curve", "A curve.", b""), "![A curve.](figures/curve.png)\n\n*A curve.*"),
    ],
)
def test_every_block_has_its_markdown(block, text):
    assert render_markdown([block]) == text + "\n"


def test_markup_in_texts_is_escaped():
    table = Table(("a|b",), (("*x*_y_",),))
    assert render_markdown([table]) == "| a\\|b |\n| :-- |\n| \\*x\\*\\_y\\_ |\n"
    assert render_markdown([Paragraph("<b>[x](y)`")]) == "\\<b\\>\\[x\\](y)\\`\n"
