"""Fast unrolls: cells' equations with gradients by hand, beside the plain ones in `forecast.cells`."""
