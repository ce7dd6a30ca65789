"""The method: search a CushionCache that keeps the attention sink out of the user's text."""
