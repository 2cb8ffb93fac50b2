"""Students that draw in few steps: `stage` is their training, each other file a method with its equations."""
