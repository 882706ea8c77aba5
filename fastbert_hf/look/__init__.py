"""A look inside a model: which leaf of its trees each token of a text takes, as numbers and as a page."""

from fastbert_hf.look.page import render_page
from fastbert_hf.look.routes import look_inside

__all__ = ["look_inside", "render_page"]
