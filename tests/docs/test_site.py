"""The site is built without a warning, and holds what its pages include."""

import importlib.util
import os
import re
import subprocess
import sys

import pytest
from docs_pages import PAGES, ROOT

needs_mkdocs = pytest.mark.skipif(
    importlib.util.find_spec("material") is None or importlib.util.find_spec("mkdocstrings_handlers") is None,
    reason="needs mkdocs-material and mkdocstrings: pip install 'vpfast[docs]'",
)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built pages by name, as HTML."""
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*.html")}


@needs_mkdocs
def test_every_page_is_there(site):
    pages = {page.removeprefix("docs/").replace(".md", ".html") for page in PAGES if page.startswith("docs/")}
    assert pages <= set(site)


@needs_mkdocs
def test_nothing_is_loaded_from_elsewhere(site):
    for name, page in site.items():
        assert not re.findall(r'<(?:script|img|iframe)[^>]+src="(?:https?:)?//', page), name
        assert not re.findall(r'<link[^>]+rel="(?:stylesheet|preload|preconnect)"[^>]+href="(?:https?:)?//', page), name


@needs_mkdocs
def test_includes_are_replaced_and_point_to_pages(site):
    assert not [name for name, page in site.items() if "include:" in page]
    assert "Ling et al." in site["models/mspn.html"]
    assert 'href="models/mspn.html"' in site["index.html"]
    assert 'href="models/mspn.html#on-a-cpu"' in site["predict.html"]
    assert not [name for name, page in site.items() if re.search(r'href="[^"]*README\.md', page)]


@needs_mkdocs
def test_the_reference_tells_of_every_public_name(site):
    import vpfast.data
    import vpfast.metrics
    import vpfast.training
    import vpfast.visual
    from vpfast import models, nn, ops

    of_models = (models, models.mspn, models.shrvqvae)
    for part in (ops, nn, *of_models, vpfast.data, vpfast.metrics, vpfast.visual, vpfast.training):
        name = part.__name__.removeprefix("vpfast.").split(".")[0]
        # The switch between backends is on the first page.
        names = set(part.__all__) - ({"backend", "current_backend"} if part is ops else set())
        page = site[f"api/{name}.html"]
        # PRESETS are shown by the models' own pages.
        missing = {each for each in names - {"PRESETS"} if not re.search(rf'id="vpfast\.{name}\.(\w+\.)?{each}"', page)}
        assert not missing, name
    for each in ("Stream", "optimize", "backend", "current_backend"):
        assert f'id="vpfast.{each}"' in site["api/vpfast.html"]


def test_pages_tell_of_the_package_alone():
    for page in [*(ROOT / "docs").rglob("*.*"), *(ROOT / "examples").rglob("*.py"), ROOT / "mkdocs.yml"]:
        if page.suffix in (".md", ".py", ".yml"):
            assert not re.search(r"/work\b|/tmp/|\bissue #?\d|\bsession\b(?!s)", page.read_text().lower()), page
