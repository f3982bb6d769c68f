"""The contract that every mixer obeys: Mixer, Context, Site, Out, state operations, traits, fallbacks."""
