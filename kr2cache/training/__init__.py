"""Stage two: readers are trained on cached states."""
