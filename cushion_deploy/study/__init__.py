"""Studies: the paper's tables and figures measured for any model, as study.json, Markdown, figures and a page."""
