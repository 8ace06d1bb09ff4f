"""What abuse, soak and fuzz share: a server in a folder of its own, stress nodes, a made-up canvas, hostile input."""
