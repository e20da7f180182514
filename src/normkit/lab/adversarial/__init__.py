"""What the task `gan` is made of: two networks as one module, their step, what is generated, and how it is judged."""
