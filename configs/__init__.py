"""The recipes that clipsys ships, found by name: `clipsys train emoji_cpu`."""
