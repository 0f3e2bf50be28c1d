"""Let a fuzzer at a parser of foreign bytes: ``python tests/fuzz.py idx|seq|codes [--runs N]``.

Atheris (``pip install 'vpfast[fuzz]'``) sees which lines of a parser an input reaches, and builds on those that reach
new ones. It starts from ``corpus/`` beside this file, which began with ``hostile.seeds()`` and grew by what was found
so. An input that breaks a promise ends the run and is left as ``crash-...`` in the current folder.
"""

import argparse
import sys
import tempfile
from pathlib import Path

CORPUS = Path(__file__).parent / "corpus"
LONGEST = {"idx": 128, "seq": 4096, "codes": 512}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", choices=sorted(LONGEST))
    parser.add_argument("--runs", type=int, default=100_000, help="inputs to try (default: %(default)s)")
    parser.add_argument("--found", type=Path, help="folder for inputs that reach new lines (default: thrown away)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as unwanted:
        found = options.found or Path(unwanted)
        found.mkdir(parents=True, exist_ok=True)
        fuzz(options.target, options.runs, found)


def fuzz(target: str, runs: int, found: Path) -> None:
    import atheris

    with atheris.instrument_imports(include=["vpfast.data", "vpfast.models.shrvqvae.codes"]):
        import hostile
    limits = [f"-runs={runs}", f"-max_len={LONGEST[target]}", "-timeout=60", "-rss_limit_mb=2048"]
    atheris.Setup([sys.argv[0], *limits, str(found), str(CORPUS / target)], hostile.TARGETS[target])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
