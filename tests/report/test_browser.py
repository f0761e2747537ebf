# SPDX-License-Identifier: Apache-2.0
"""Law: what a report shows is shown, and not run, by a real browser.

`test_report.py` reads the page as HTML; here Chromium does, where there is one.
"""

import dataclasses
import re
import shutil
import subprocess

import pytest

from adaptivejax import report as reports
from tests.report.test_report import full

BROWSER = next(
  filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))),
  None,
)
MARK = "document.documentElement.dataset.run=1"
TRICKS = (
  f"<script>{MARK}</script>",
  f"</script><script>{MARK}</script>",
  f"</style></title></pre></svg><script>{MARK}</script>",
  f'"><img src=x onerror="{MARK}">',
  f"' onmouseover='{MARK}' autofocus onfocus='{MARK}' x='",
  f"<svg onload={MARK}>",
  f"<!--<img src=x onerror={MARK}>-->",
  f"javascript:{MARK}",
  f"\0<scr\0ipt>{MARK}</script>",
  f"]]><script>{MARK}</script>",
  f"&lt;script&gt;{MARK}",
)


def dom(path):
  """The page after its scripts, if it had any, have run."""
  command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu"]
  command += ["--virtual-time-budget=3000", "--dump-dom", path.as_uri()]
  done = subprocess.run(command, capture_output=True, text=True, timeout=120)
  assert "</html>" in done.stdout, done.stderr[-500:]
  return done.stdout


@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium here")
def test_tricks_are_shown_and_not_run(tmp_path):
  text = "\n".join(TRICKS)
  page = reports.write_report(
    dataclasses.replace(
      full(text),
      title=text,
      command=text,
      environment={text: text},
      budgets=(reports.data.BudgetCurve(text, text, (1.0, 2.0), (0.5, 1.0)),),
      snippets=(
        reports.Snippet(text.encode(), (0.5,) * len(text), (), text, text),
      ),
      samples=(reports.Sample(text.encode(), text.encode(), text, text, 1.0),),
      measured=(text,),
      notes=(text,),
    ),
    tmp_path,
  )
  control = tmp_path / "control.html"
  control.write_text(f"<html><body>{TRICKS[0]}</body></html>")
  assert 'data-run="1"' in dom(control), "the browser runs what is a script"
  # Escaping alone must do; the page's policy is a second wall.
  bare = re.sub(r"<meta http-equiv[^>]*>", "", page.read_text("utf-8"))
  (tmp_path / "bare.html").write_text(bare, "utf-8")
  for path in (page, tmp_path / "bare.html"):
    shown = dom(path)
    assert "data-run" not in shown
    assert not re.search(r"<(script|img|iframe)\b", shown)
    assert shown.count("&lt;script&gt;document") > 10
