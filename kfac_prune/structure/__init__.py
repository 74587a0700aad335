"""Structured removal: groups of rows and columns that fall together, so that the model really shrinks."""
