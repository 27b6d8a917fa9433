"""The study that decides whether SGD beats GD, and which noises go with SGD."""
