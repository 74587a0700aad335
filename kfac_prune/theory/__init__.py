"""The theory on problems so small that everything is exact: what ``kfac-prune theory`` shows and explains."""
