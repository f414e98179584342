import hashlib
import json
import time
import warnings

import pytest

from rankflow.errors import RankFlowError
from rankflow.training import docstrings
from rankflow.training.docstrings import SourceTree, collect_corpus, load_docstrings, to_dataset

DOCUMENTED = '''"""{module} opens with this sentence about {subject}.

A second paragraph that is not read.
"""

class Thing:
    """Hold one {subject} and its neighbours
    for later use."""

    def method(self):
        """Return the {subject} as it was given."""

try:
    def inner():
        """Short."""
except ImportError:
    def fallback():
        """Work without the {subject} when it is missing."""
'''


@pytest.fixture
def tree(tmp_path):
    """Two documented children, a private one, tests, and files that cannot be read."""
    root = tmp_path / "pkg"
    for folder in ("apple", "apple/tests", "_hidden"):
        (root / folder).mkdir(parents=True)
    (root / "apple" / "core.py").write_text(DOCUMENTED.format(module="core", subject="fruit"))
    (root / "apple" / "tests" / "check.py").write_text('"""A sentence that only tests contain."""')
    (root / "_hidden" / "x.py").write_text('"""A sentence of the private child of the tree."""')
    (root / "pear.py").write_text(DOCUMENTED.format(module="pear", subject="number"))
    (root / "apple" / "latin.py").write_bytes(
        '"""Ein sch\u00f6ner Satz ohne Kodierung."""'.encode("latin1")
    )
    (root / "apple" / "broken.py").write_text('"""A sentence above a syntax error."""\ndef (:')
    (root / "apple" / "zeros.py").write_bytes(b'"""A sentence before a null byte."""\0')
    return SourceTree("pkg", root, docstrings._public_children(root))


def collect(*trees):
    return collect_corpus(trees, min_rows=1)


def rows_of(corpus):
    return {t: corpus.labels[c] for t, c in zip(corpus.texts, corpus.classes, strict=True)}


def test_each_docstring_gives_its_first_paragraph_and_its_subpackage(tree):
    assert rows_of(collect(tree)) == {
        "core opens with this sentence about fruit.": "pkg.apple",
        "Hold one fruit and its neighbours for later use.": "pkg.apple",
        "Return the fruit as it was given.": "pkg.apple",
        "Work without the fruit when it is missing.": "pkg.apple",
        "opens with this sentence about number.": "pkg.pear",
        "Hold one number and its neighbours for later use.": "pkg.pear",
        "Return the number as it was given.": "pkg.pear",
        "Work without the number when it is missing.": "pkg.pear",
    }


def test_files_that_are_not_utf8_or_do_not_parse_are_skipped_and_counted(tree):
    corpus = collect(tree)
    assert (corpus.files, corpus.skipped) == (5, 3)
    assert "5 source files (3 unreadable" in to_dataset(corpus)["train"].info.description


def test_invalid_escapes_in_old_sources_do_not_warn(tree):
    source = '"""A sentence above an invalid escape."""\nPATTERN = "\\d+"\n'
    with pytest.warns((SyntaxWarning, DeprecationWarning)):
        compile(source, "old", "exec")
    (tree.folder / "pear.py").write_text(source)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "A sentence above an invalid escape." in collect(tree).texts


def test_a_text_of_two_classes_is_dropped_from_both(tree):
    (tree.folder / "pear.py").write_text('"""RETURN the fruit as it was given."""')
    extra = '\ndef f():\n    """A sentence that only pears contain."""\n'
    with (tree.folder / "pear.py").open("a") as file:
        file.write(extra)
    rows = rows_of(collect(tree))
    assert not [text for text in rows if text.lower() == "return the fruit as it was given."]
    assert rows["A sentence that only pears contain."] == "pkg.pear"


def test_words_of_the_class_name_do_not_leak_into_the_text():
    text = "Use torch.nn.Linear, TORCH or nn (torchvision and nn_x keep theirs)."
    stripped = docstrings.strip_label(text, "torch.nn")
    assert stripped == "Use Linear, or (torchvision and _x keep theirs)."


def test_a_class_keeps_at_most_its_share_of_rows_and_small_classes_vanish(tmp_path):
    for child, count in (("big", 30), ("even", 20), ("small", 3)):
        functions = [
            f'def f{i}():\n    """Sentence {i}, written for {child[0]}."""\n' for i in range(count)
        ]
        (tmp_path / f"{child}.py").write_text("".join(functions))
    tree = SourceTree("", tmp_path, ("big", "even", "small"))
    corpus = collect_corpus([tree], min_rows=10, max_rows=25)
    assert corpus.labels == ["big", "even"]
    assert [corpus.classes.count(0), corpus.classes.count(1)] == [25, 20]


def test_the_split_depends_on_nothing_but_the_text(tmp_path):
    functions = [f'def f{i}():\n    """Sentence number {i}."""\n' for i in range(1000)]
    for child in ("one", "two"):
        (tmp_path / f"{child}.py").write_text("".join(functions).replace("Sen", child[0] + "en"))
    corpus = collect_corpus([SourceTree("", tmp_path, ("one", "two"))], max_rows=1000)
    for text, split in zip(corpus.texts, corpus.splits, strict=True):
        tenth = int(hashlib.sha256(text.encode()).hexdigest(), 16) % 2**64 % 10
        assert split == {8: 1, 9: 2}.get(tenth, 0)
    shares = [corpus.splits.count(index) / len(corpus.splits) for index in range(3)]
    assert shares == pytest.approx([0.8, 0.1, 0.1], abs=0.02)
    assert collect_corpus([SourceTree("", tmp_path, ("two", "one"))], max_rows=1000) == corpus


def test_fewer_than_two_classes_are_refused_with_the_remedy(tree):
    with pytest.raises(RankFlowError, match=r"5 source files gave 0.*\.py files.*\[data\] train"):
        collect_corpus([tree], min_rows=100)


@pytest.fixture
def counted_reads(tmp_path, monkeypatch):
    """Stand two modules of 120 docstrings in for the installed packages; count the readings."""
    for child in ("one", "two"):
        functions = [
            f'def f{i}():\n    """Sentence number {i} of {child[0]}."""\n' for i in range(120)
        ]
        (tmp_path / f"{child}.py").write_text("".join(functions))
    calls = []
    trees = (SourceTree("", tmp_path, ("one", "two")),)
    monkeypatch.setattr(docstrings, "installed_trees", lambda: calls.append(1) or trees)
    return calls


def test_the_second_load_comes_from_the_cache(counted_reads):
    first, second = load_docstrings(), load_docstrings()
    assert len(counted_reads) == 1
    assert {n: s.to_dict() for n, s in first.items()} == {n: s.to_dict() for n, s in second.items()}
    assert first["train"].features == second["train"].features
    assert [p.name for p in docstrings.cache_path().parent.iterdir()] == [
        docstrings.cache_path().name
    ]


@pytest.mark.parametrize("damage", ["", "{", '{"labels": []}', "[]", "\udcff"])
def test_an_unreadable_cache_is_rebuilt(counted_reads, damage):
    load_docstrings()
    docstrings.cache_path().write_bytes(damage.encode("utf-8", "surrogateescape"))
    load_docstrings()
    load_docstrings()
    assert len(counted_reads) == 2


def test_a_cache_whose_columns_disagree_is_rebuilt(counted_reads):
    load_docstrings()
    path = docstrings.cache_path()
    path.write_text(json.dumps(json.loads(path.read_text()) | {"classes": [0]}))
    load_docstrings()
    assert len(counted_reads) == 2


def test_a_cache_that_cannot_be_written_is_a_warning(counted_reads, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="cannot cache the data set 'docstrings'"):
        assert load_docstrings()["train"].num_rows > 0


def test_the_cache_follows_the_versions_of_the_packages(monkeypatch):
    before = docstrings.cache_path()
    monkeypatch.setattr(docstrings.importlib.metadata, "version", lambda package: "0.0.1")
    assert docstrings.cache_path() != before


def test_the_standard_library_alone_gives_many_classes_quickly():
    started = time.process_time()
    stdlib = docstrings.installed_trees()[0]
    corpus = collect_corpus([stdlib])
    assert time.process_time() - started < 20
    assert {"asyncio", "email", "unittest"} <= set(corpus.labels)
    assert len(corpus.texts) == len(set(corpus.texts)) > 1000
    assert not [text for text in corpus.texts if len(text) < docstrings.MIN_CHARACTERS]
