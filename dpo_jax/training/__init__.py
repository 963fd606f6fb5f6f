"""Training runs without a configuration: resumed, logged and saved (`run`), with a cached reference pass (`references`)."""
