"""What every room stands on: names, bounds, files, processes, and the contracts of the rooms."""
