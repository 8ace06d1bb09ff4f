"""The only folder that knows ComfyUI."""
