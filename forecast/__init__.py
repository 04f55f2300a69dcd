"""Spatiotemporal forecasting: cells, networks, scores and the Lightning module that trains them."""
