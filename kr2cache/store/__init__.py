"""All caches: what each was made from, which one fits, how one is made from another."""
