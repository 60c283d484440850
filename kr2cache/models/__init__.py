"""Models, frozen or trained: names, files, tokenizers, hidden states."""
