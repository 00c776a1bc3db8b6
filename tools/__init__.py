"""Programs for those who develop the project; none of them is installed."""
