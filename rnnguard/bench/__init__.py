"""What `rnnguard bench` does: four character models trained alike on a text, and measured."""
