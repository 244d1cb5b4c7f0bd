"""Prompt–response pairs of real text that is on every machine: what this Python has installed, and WikiText paragraphs.

python benchmarks/corpus.py OUT.jsonl [--pairs 15000] [--wikitext FILE] [--packages FOLDER]...

Two kinds of pairs: the docstring of a function -> its source without the docstring; the first sentence of a paragraph ->
the rest of it. No text is made up and no pair occurs twice. Order and choice are by hashes, so that the same packages
and the same WikiText file give the same bytes; other versions of the packages give other pairs, which is why every
benchmark writes down the digest of its corpus.
"""

from __future__ import annotations

import argparse
import ast
import json
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path

EXAMPLE = Path(__file__).resolve().parent.parent / "examples/wikitext/data"
PROSE_SHARE = 0.8  # of the pairs, where there is so much prose
MIN_CHARACTERS = 20  # of a docstring
MAX_CHARACTERS = 20_000  # of a source: longer ones are tables
MIN_SENTENCE, MIN_PARAGRAPH = 100, 300  # characters

Pair = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Corpus:
    """What a corpus file holds; `prose` and `code`: pairs of each kind, None where that is not known; `bytes` of the file.

    >>> Corpus(Path("some/a.jsonl"), pairs=5, prose=4, code=1, bytes=900, blake2b="00").about()["path"]
    'a.jsonl'
    """

    path: Path
    pairs: int
    prose: int | None
    code: int | None
    bytes: int
    blake2b: str

    def about(self) -> dict[str, int | str | None]:
        """What a report says of it: the file's name, not its folder."""
        return {**asdict(self), "path": self.path.name}


def existing(path: Path) -> Corpus:
    """A corpus file that was made before. Raises OSError where there is none."""
    data = path.read_bytes()
    return Corpus(path.resolve(), data.count(b"\n"), None, None, len(data), _digest(data))


def default_packages() -> list[Path]:
    """The installed packages of this Python, then its standard library."""
    return [Path(sysconfig.get_path(name)) for name in ("purelib", "stdlib")]


def prose(files: Sequence[Path]) -> Iterator[Pair]:
    """First sentence -> the rest, of every paragraph of WikiText files that has both.

    >>> next(prose(sorted(EXAMPLE.glob("*.txt"))))[1][:38]
    'Their 17th @-@ place finish in 2012 – '
    """
    for file in files:
        for line in file.read_text().splitlines():
            paragraph = line.strip()
            end = paragraph.find(" . ", MIN_SENTENCE)
            if len(paragraph) >= MIN_PARAGRAPH and not paragraph.startswith("=") and end > 0:
                yield paragraph[: end + 2], paragraph[end + 3 :]


def code(folders: Sequence[Path]) -> Iterator[Pair]:
    """Docstring -> source, of every documented function in the Python files of these folders.

    The files come in the order of the hash of their names: a few of them are a fair sample, wherever the folder is.
    """
    for folder in folders:
        paths = (path.relative_to(folder).as_posix() for path in folder.rglob("*.py"))
        for name in sorted(paths, key=_hash):
            try:
                source = (folder / name).read_text()
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # other people's invalid escapes
                    tree = ast.parse(source)
            except (OSError, ValueError, SyntaxError, RecursionError):  # templates and tests of parsers
                continue
            yield from documented(source, tree)


def documented(source: str, tree: ast.AST) -> Iterator[Pair]:
    """Docstring -> source without it, by line numbers: `ast.get_source_segment` would split the file for every function.

    >>> text = 'def double(x):\\n    "Twice a number, of any kind."\\n    return 2 * x\\n'
    >>> list(documented(text, ast.parse(text)))
    [('Twice a number, of any kind.', 'def double(x):\\n    return 2 * x')]
    """
    lines = source.splitlines()
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or len(node.body) < 2:
            continue
        docstring = ast.get_docstring(node)
        if not docstring or len(docstring) <= MIN_CHARACTERS:
            continue
        written = node.body[0]
        kept = lines[node.lineno - 1 : written.lineno - 1] + lines[written.end_lineno : node.end_lineno]
        response = "\n".join(line[node.col_offset :] if line[: node.col_offset].isspace() else line for line in kept)
        if response.strip() and len(response) < MAX_CHARACTERS:
            yield docstring, response


def unique(pairs: Iterator[Pair], most: int) -> list[str]:
    """The first `most` pairs as JSON lines, each once.

    >>> unique(iter([("a", "b"), ("a", "b"), ("c", "d")]), 2)
    ['{"prompt": "a", "response": "b"}', '{"prompt": "c", "response": "d"}']
    """
    found: dict[str, None] = {}
    for prompt, response in pairs:
        if len(found) >= most:
            break
        line = json.dumps({"prompt": prompt, "response": response}, ensure_ascii=False)
        if _is_utf8(line):
            found[line] = None
    return list(found)


def write(path: Path, pairs: int, *, wikitext: Sequence[Path] = (), packages: Sequence[Path] = ()) -> Corpus:
    """Write up to `pairs` pairs as JSON lines: prose for four fifths of them, as far as there is any, then code.

    Defaults: the WikiText slices of the examples; the packages of this Python.
    """
    prose_lines = unique(prose(wikitext or sorted(EXAMPLE.glob("*.txt"))), round(pairs * PROSE_SHARE))
    code_lines = unique(code(packages or default_packages()), pairs - len(prose_lines))
    data = "".join(line + "\n" for line in sorted(prose_lines + code_lines, key=_hash)).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return Corpus(path, data.count(b"\n"), len(prose_lines), len(code_lines), len(data), _digest(data))


def _digest(data: bytes) -> str:
    return blake2b(data, digest_size=16).hexdigest()


def _hash(text: str) -> bytes:
    return blake2b(text.encode(errors="surrogatepass"), digest_size=16).digest()


def _is_utf8(text: str) -> bool:
    """Whether it can be written: tests of encodings hold lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--pairs", type=int, default=15_000)
    parser.add_argument(
        "--wikitext", type=Path, action="append", default=[], help="a WikiText file; default: the examples'"
    )
    parser.add_argument(
        "--packages", type=Path, action="append", default=[], help="a folder; default: this Python's own"
    )
    given = parser.parse_args()
    made = write(given.out, given.pairs, wikitext=given.wikitext, packages=given.packages)
    print(json.dumps(made.about()))


if __name__ == "__main__":
    main()
