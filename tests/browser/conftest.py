"""A real Chromium, driven over what the package writes; without one these tests skip, with the reason."""

import os
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest

WITHOUT_ANIMATION = {"reduced_motion": "reduce"}


@pytest.fixture(scope="session")
def chromium():
    """Debian's Chromium, or the one that CHROMIUM names."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    found = os.environ.get("CHROMIUM") or shutil.which("chromium")
    if found is None:
        pytest.skip("no Chromium here: apt-get install chromium, or name one in CHROMIUM")
    with playwright.sync_playwright() as driver:
        # as root, which CI is, Chromium has no sandbox
        browser = driver.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


class Opened(NamedTuple):
    """A page that is watched."""

    page: object
    complaints: list
    """Console errors, uncaught exceptions and dialogs."""
    requests: list
    """What was asked for, by URL."""

    def require_quiet(self, within: Path):
        """No complaint, and nothing asked for outside of `within` (a file, or a folder)."""
        assert self.complaints == []
        allowed = ("data:", "blob:", within.as_uri())
        assert [url for url in self.requests if not url.startswith(allowed)] == []

    def accessibility(self):
        """What axe-core finds wrong, each as a line."""
        from axe_playwright_python.sync_playwright import Axe

        found = Axe().run(self.page).response["violations"]
        return [
            f"{each['id']}: {node['target']} {node['failureSummary']}"
            for each in found
            for node in each["nodes"]
        ]


@pytest.fixture
def opened(chromium):
    """`opened(path, theme="dark", width=390)`: a fresh page at that file, or at a URL."""
    contexts = []

    def go(address, *, theme="light", width=1280, height=900, fragment=""):
        context = chromium.new_context(
            viewport={"width": width, "height": height},
            color_scheme=theme,
            bypass_csp=False,
            **WITHOUT_ANIMATION,
        )
        contexts.append(context)
        page = context.new_page()
        complaints, requests = [], []
        page.on("console", lambda said: complaints.append(said.text) if said.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: (complaints.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.on("request", lambda request: requests.append(request.url))
        url = address.as_uri() if isinstance(address, Path) else address
        page.goto(url + fragment)
        return Opened(page, complaints, requests)

    yield go
    for context in contexts:
        context.close()
