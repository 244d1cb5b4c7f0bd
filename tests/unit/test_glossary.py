from pathlib import Path

from sft_dist.glossary import GLOSSARY, POSITION, as_markdown, metric

PAGE = Path(__file__).parents[2] / "docs/metrics.md"


def test_every_metric_has_one_tag_and_is_told_in_full():
    assert len({one.tag for one in GLOSSARY.values()}) == len(GLOSSARY)
    for name, one in GLOSSARY.items():
        assert one.tag.count("/") == 1 + name.count("/"), name
        assert all(one), name
        for sentence in (one.meaning, one.healthy):
            assert sentence[0].isupper() or sentence[0] == "`" or sentence.startswith("exp("), name
            assert sentence.endswith("."), name
    assert set(POSITION) <= GLOSSARY.keys()


def test_what_is_measured_of_each_part_has_the_tag_of_the_whole():
    assert metric("loss/chat").tag == "train/loss/chat"
    assert metric("epochs/a.b-c").tag == "train/epochs/a.b-c"
    assert metric("validation_perplexity/code").tag == "validation/perplexity/code"
    assert [metric(name) for name in ("unheard_of", "grad_norm/chat", "general_loss/x", "")] == [None] * 4


def test_the_page_is_the_glossary():
    """Mended by: python -m tests.unit.test_glossary"""
    head, begin, _ = PAGE.read_text().partition(BEGIN)
    assert begin
    assert PAGE.read_text() == head + BEGIN + as_markdown()


BEGIN = "<!-- made from sft_dist/glossary.py by: python -m tests.unit.test_glossary -->\n"

if __name__ == "__main__":
    PAGE.write_text(PAGE.read_text().partition(BEGIN)[0] + BEGIN + as_markdown())
