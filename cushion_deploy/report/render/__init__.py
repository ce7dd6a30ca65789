"""Rendering: page elements to HTML and Markdown, matplotlib figures to images, numbers and tokens to text."""
