"""Composites: memories made of memories, whatever their kinds."""
