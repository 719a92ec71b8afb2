"""The before/after report: one Markdown file and one self-contained page."""
