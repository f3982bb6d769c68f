"""The page of a gauntlet, from its gauntlet.json."""
