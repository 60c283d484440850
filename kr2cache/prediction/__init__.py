"""A trained reader labels new text."""
