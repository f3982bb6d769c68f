"""Memory kinds, one file each: how a sequence layer stores what it has seen."""
