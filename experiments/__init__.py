"""The paper's experiments: data, models, configuration and command line."""
