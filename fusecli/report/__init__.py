"""An Outcome as JSON, Markdown, or on a terminal: the same facts, and no torch.

To add a rendering: one file with a pure function of an Outcome, built from `facts`, `wording` and `figures`;
whatever came out of a file goes through `visible`.
"""

from fusecli.report.inspection import print_contents
from fusecli.report.json_text import as_json, contents_as_json
from fusecli.report.markdown import as_markdown
from fusecli.report.picture import as_svg
from fusecli.report.terminal import print_terminal

__all__ = ["as_json", "as_markdown", "as_svg", "contents_as_json", "print_contents", "print_terminal"]
