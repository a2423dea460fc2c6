"""The measuring instrument; leaves no trace on what it measures."""
