"""Stage one: a frozen model runs over a split, its states go into a cache."""
