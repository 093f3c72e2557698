"""How good a model is, and how far two are apart: `evaluation` runs them on text, `comparison` reads their weights."""
