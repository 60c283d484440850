"""A trained reader at work on new text."""
