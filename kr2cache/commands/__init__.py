"""One file for each group of commands: their options, and what they show. ``cli`` puts them together."""
