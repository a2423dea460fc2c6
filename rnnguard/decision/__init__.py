"""From readings to findings and a plan; tables, no torch."""
