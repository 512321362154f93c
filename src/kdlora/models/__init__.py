"""Models: encoders from the Hub or a folder, students cut from layers, LoRA adapters and their merge."""
