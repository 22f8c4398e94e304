"""What each command of the shell does; `jisu.cli` has their options."""
