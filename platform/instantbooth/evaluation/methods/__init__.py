"""Ways to personalize, side by side: each learns a subject from references and pictures it by prompts and seeds."""
