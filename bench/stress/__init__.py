"""What the benches abuse and soak share: a real server in a folder of its own, its stress nodes, and a made-up canvas."""
