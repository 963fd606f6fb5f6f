"""Control: policies, worlds with known optimum or a simulator, preferences between segments, CPL and its baselines."""
