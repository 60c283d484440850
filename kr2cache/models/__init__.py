"""A model, frozen or trained: its name, its files, its tokenizer, its states."""
