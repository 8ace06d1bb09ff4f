"""What the demo and the benches ask for."""

# Eight prompts the model draws recognisably, one picture each in the demo and the benches.
PROMPTS = (
    "grinning face",
    "smiling face with sunglasses",
    "red heart",
    "cat face",
    "hamburger",
    "strawberry",
    "panda",
    "red apple",
)
