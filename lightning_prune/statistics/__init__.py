"""One file per running quantity, each a torchmetrics.Metric that knows how ranks merge it."""
