"""Forecasters that need no training: what a network has to beat."""
