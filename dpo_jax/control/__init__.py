"""Control from preferences: policies, environments, preferences between segments, CPL and its baselines."""
