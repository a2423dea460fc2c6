"""The hands: the only place that changes a model or an optimizer."""
