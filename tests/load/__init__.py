"""Long runs under load: storm, fuzz, soak."""
